"""How a base is quantised while it is loaded: bitsandbytes, through transformers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from transformers import BitsAndBytesConfig

Kind = Literal["nf4", "fp4", "int8"]
Storage = Literal["uint8", "bfloat16", "float16", "float32"]
PACKAGES = ("bitsandbytes", "accelerate")  # what transformers asks for


class Quantization(ABC):
    """Settings of a quantisation, as a config file states them."""

    @abstractmethod
    def loading(self, compute_dtype: torch.dtype, head: Callable[[], Sequence[str]]) -> Any:
        """Return the ``quantization_config`` of transformers.

        Args:
            compute_dtype: In which the layers multiply, if the settings leave it open.
            head: Finds the names of the output head, which keeps its precision.
        """


@dataclass(frozen=True)
class BitsAndBytes(Quantization):
    """Linear layers in 4 or 8 bits; embeddings, norms and the output head as they are.

    Args:
        kind: nf4 is the NormalFloat of QLoRA (arXiv 2305.14314), the best of the three for
            normally distributed weights; fp4 a 4-bit float; int8 takes twice the memory.
        double_quant: Quantise the scales as well: 4.127 bits a parameter instead of 4.5.
        compute_dtype: In which layers multiply; auto follows the trainer's precision. fp16 is less
            stable than bf16.
        storage: Data type that packs the numbers. Sharding (FSDP) wants that of the other weights;
            it changes no result.
        skip: Name endings of more layers that keep their precision.
        threshold: int8: inputs above it are multiplied in 16 bits (LLM.int8(), arXiv 2208.07339).
    """

    kind: Kind = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    storage: Storage = "uint8"
    skip: list[str] | None = None
    threshold: float = 6.0

    def __post_init__(self) -> None:
        for name, kinds in {"kind": Kind, "storage": Storage}.items():
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"quantization: {name} must be one of {', '.join(get_args(kinds))}, got "
                    f"{getattr(self, name)!r}"
                )

    def loading(
        self, compute_dtype: torch.dtype, head: Callable[[], Sequence[str]]
    ) -> BitsAndBytesConfig:
        """Return the ``quantization_config`` of transformers."""
        missing = [name for name in PACKAGES if find_spec(name) is None]
        if missing:
            raise RuntimeError(
                f"quantization={self.kind!r} needs {' and '.join(missing)}: pip install "
                "'lit_adapters[quant]'"
            )
        skipped = None if self.skip is None else [*head(), *self.skip]
        if self.kind == "int8":
            return BitsAndBytesConfig(
                load_in_8bit=True,
                llm_int8_threshold=self.threshold,
                llm_int8_skip_modules=skipped,
            )
        if self.compute_dtype != "auto":
            compute_dtype = getattr(torch, self.compute_dtype)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=getattr(torch, self.storage),
            llm_int8_skip_modules=skipped,
        )


def as_quantization(chosen: Kind | Quantization | None) -> Quantization | None:
    """Return the settings that a short name stands for.

    Raises:
        ValueError: if there is no such name.
    """
    return BitsAndBytes(chosen) if isinstance(chosen, str) else chosen
