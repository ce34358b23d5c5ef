"""What a trainer checkpoint holds of a model whose base is frozen, and the random state."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lit_adapters.adapters import Adapter
from lit_adapters.spread import plain_name, whole_shape
from lit_adapters.weights import is_plain


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the parameters that training never changes: frozen and not part of an adapter."""
    adapters = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    return {
        plain_name(name)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad and id(parameter) not in adapters
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what `keep_trained` keeps of the model's state, by name; what is sharded stays so.

    The tensors are the model's own. FSDP1 is not asked for its state: it would gather the base.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    if all(plain_name(name) == name for name in parameters):
        return keep_trained(model, model.state_dict())
    buffers = {
        f"{prefix}.{name}": buffer
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return keep_trained(model, {plain_name(n): t for n, t in {**parameters, **buffers}.items()})


def trained_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold what training changes: adapters, layers trained themselves."""
    adapters = [
        m for module in model.modules() if isinstance(module, Adapter) for m in module.modules()
    ]
    trained = [
        module
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    return list(dict.fromkeys([*adapters, *trained]))


def keep_trained(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``state`` without the frozen parameters and what is derived from them.

    A quantised weight ``w`` also writes ``w.absmax`` and the like, or its layer ``SCB``; those go
    with it.
    """
    frozen = frozen_names(model) | {
        key for key in state if _is_side_tensor(model, *key.rpartition(".")[::2])
    }
    return {
        key: value
        for key, value in state.items()
        if not any(part in frozen for part in _prefixes(key))
    }


def _is_side_tensor(model: nn.Module, owner: str, leaf: str) -> bool:
    """Whether ``leaf`` is what a quantised layer writes of itself beside its parameters."""
    try:
        layer = model.get_submodule(owner)
    except AttributeError:  # of a part of a weight, or nothing of this model
        return False
    return not is_plain(layer) and leaf not in layer._parameters


def check_trained(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Compare a checkpoint's tensors with what is trained in ``model``.

    An adapter that was pinned to its origin in the checkpoint is pinned here too, and the reverse.

    Raises:
        ValueError: naming the first missing, unexpected or differently shaped tensor.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            start = f"{plain_name(name)}."
            before = dict(module.named_parameters())
            module.adopt({key[len(start) :] for key in state if key.startswith(start)})
            changed = before.keys() ^ dict(module.named_parameters()).keys()
            if changed and any(hasattr(p, "full_tensor") for p in before.values()):
                raise ValueError(
                    f"adapters of the checkpoint start elsewhere than those here ({start}"
                    f"{sorted(changed)[0]} is in one alone), and what is sharded gets no other "
                    "parameters; take the InitAdapters callback of the run that wrote it"
                )
    expected = trained_tensors(model)
    for key in expected:
        if key not in state:
            raise ValueError(
                f"the checkpoint lacks {key!r}, which is trained here; was it written with "
                "another adapter or other targets?"
            )
        shape = whole_shape(expected[key])
        if state[key].shape != shape:
            raise ValueError(
                f"{key!r} has shape {tuple(state[key].shape)} in the checkpoint and "
                f"{tuple(shape)} here; was it written with another rank or base?"
            )
    unexpected = set(keep_trained(model, state)) - set(expected)
    if unexpected:
        raise ValueError(
            f"the checkpoint holds {sorted(unexpected)[0]!r} (and {len(unexpected) - 1} more), "
            "which is not trained here; was it written with other targets?"
        )


def random_state() -> dict[str, Any]:
    """State of the global random generators, in types that ``weights_only=True`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), gauss],
        "python": list(random.getstate()),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
