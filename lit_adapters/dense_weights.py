"""The matrices of a model as they were before it was quantised, one at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from lit_adapters.weights import is_plain, read_weight

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Matrices(Protocol):
    """Something that gives a layer's matrix by the layer's name; a dictionary will do."""

    def __getitem__(self, name: str) -> Tensor:
        """Return it (out, in)."""


class DenseWeights:
    """Reads from the files that a model was loaded from; never more than one matrix at a time.

    A layer of the model that is not quantised gives its own.

    Raises:
        ValueError: if there are no such files, or they have other names for the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        roots = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        self.prefix = f"{roots[0].base_model_prefix}." if roots else ""
        config = getattr(roots[0], "config", None) if roots else None
        self.source = str(getattr(config, "_name_or_path", "") or "")
        self.revision = getattr(config, "_commit_hash", None)
        self._files: Mapping[str, str] | None = None  # by key

    def __getitem__(self, name: str) -> Tensor:
        """Return the matrix (out, in) of the layer called ``name``, fp32, on its device."""
        layer = self.model.get_submodule(name)
        if is_plain(layer):
            return read_weight(layer).clone()
        if self._files is None:
            self._files = self._find()
        full = f"{name}.weight"
        keys = [key for key in (full, full.removeprefix(self.prefix)) if key in self._files]
        if not keys:
            raise ValueError(
                f"{self.source!r} has no weight called {full!r}, so what {name!r} held before it "
                "was quantised is not known; pass weights={layer name: matrix (out, in)}"
            )
        with safe_open(self._files[keys[0]], "pt") as file:
            stored = file.get_tensor(keys[0])
        if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):
            stored = stored.T
        return stored.to(layer.get_parameter("weight").device, torch.float32).contiguous()

    def _find(self) -> dict[str, str]:
        index, whole = self._path(INDEX), self._path(ONE)
        if index is not None:
            named = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            if any(Path(file).name != file for file in named.values()):
                raise ValueError(f"{index} names files outside its folder")
            paths = {file: self._path(file) or "" for file in sorted(set(named.values()))}
            return {key: paths[file] for key, file in named.items()}
        if whole is None:
            raise ValueError(
                f"the unquantised weights are needed and were not found: {self.source!r} is no "
                f"folder or hub id with {ONE}; pass weights={{layer name: matrix (out, in)}}"
            )
        with safe_open(whole, "pt") as file:
            return dict.fromkeys(file.keys(), whole)

    def _path(self, file: str) -> str | None:
        local = Path(self.source) / file
        if not self.source or Path(self.source).is_dir():
            return str(local) if self.source and local.is_file() else None
        found = cached_file(
            self.source,
            file,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else str(found)


def in_fp32(matrix: Tensor, layer: nn.Module) -> Tensor:
    """Return ``matrix`` in fp32 on the device of ``layer``."""
    return matrix.detach().to(next(layer.parameters()).device, torch.float32)
