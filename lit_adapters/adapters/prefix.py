"""Prefix tuning: learned keys and values before the first token (arXiv 2101.00190)."""

import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lit_adapters.adapters.base import Adapted, Adapter, AdapterSpec
from lit_adapters.adapters.fields import read_field
from lit_adapters.adapters.prefix_layer import PrefixAdapter
from lit_adapters.adapters.prefix_peft import peft_problem, stacked, unstack

STACKED = "prompt_embeddings"  # the key of PEFT's one tensor


@dataclass(frozen=True)
class PrefixTuning(AdapterSpec):
    """Keys and values that every token attends to, in one softmax with the tokens' own.

    Trained as they are: the paper's network that computes them during training is left out, as it
    is thrown away afterwards. Unlike the other methods, a fresh prefix changes the output.

    Args:
        length: Prefix tokens.
        targets: A regular expression for whole dotted names, or a list of name endings, of
            attention modules; ``"all"`` is all of them.
        exclude: Names to leave out: a regular expression or a list of name endings.
        layers: Keep only modules inside the decoder layers of these numbers.
        text: Start from the keys and values of the first ``length`` tokens of this text, which
            trains better than a random start. Null draws from N(0, 0.02^2).
    """

    peft_types: ClassVar[tuple[str, ...]] = ("PREFIX_TUNING", "LIT_PREFIX")
    peft_fields: ClassVar[Set[str]] = frozenset(
        "num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers "
        "encoder_hidden_size prefix_projection init_weights target_modules".split()
    )

    length: int = 20
    targets: str | list[str] = field(default_factory=lambda: ["self_attn"])
    exclude: str | list[str] | None = None
    layers: list[int] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.length) is not int or self.length < 1:
            raise ValueError(f"length must be a positive integer, got {self.length!r}")
        if self.text is not None and not isinstance(self.text, str):
            raise ValueError(f"text must be a string, got {self.text!r}")

    def fits(self, layer: Any) -> bool:
        """Whether ``layer`` is causal self-attention that takes its keys from a cache."""
        known = inspect.signature(layer.forward).parameters
        return (
            "past_key_values" in known
            and "key_value_states" not in known  # cross-attention
            and getattr(layer, "is_causal", False) is True
            and not hasattr(layer, "is_kv_shared_layer")  # reads another layer's keys
            and all(hasattr(layer, n) for n in ("k_proj", "v_proj", "head_dim", "layer_idx"))
            and layer.k_proj.out_features == layer.v_proj.out_features
        )

    @property
    def reads_text(self) -> bool:
        """Whether there is a text to start from."""
        return self.text is not None

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:
        """Start from ``text``, if there is one."""
        if self.text is not None:
            start_from_text(model, tokenizer(self.text, return_tensors="pt")["input_ids"])

    def build(self, layer: nn.Module, name: str) -> PrefixAdapter:
        """Return a prefix for ``layer``, values not yet set."""
        return PrefixAdapter(self, self.length, layer, peft_problem(layer))

    def filed(self, adapters: Sequence[Adapter]) -> "PrefixTuning":
        """Return the settings of PEFT's layout where PEFT computes the same."""
        endings = isinstance(self.targets, list) and not any("." in t for t in self.targets)
        every = (endings or self.targets == "all") and self.exclude is None and self.layers is None
        fits_peft = all(isinstance(a, PrefixAdapter) and a.peft_problem is None for a in adapters)
        return PEFTPrefixTuning(self.length, "all") if every and fits_peft else self

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of a config that PEFT refuses, because it would compute something else.

        PEFT's prefix is in every layer, slides out of windows and knows only static rotations.
        """
        return {
            "peft_type": "LIT_PREFIX",
            "num_virtual_tokens": self.length,
            "target_modules": targets,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "PrefixTuning":
        """Return the settings that PEFT's config, or ours, states."""
        length = read_field(config, "num_virtual_tokens", int)
        if config["peft_type"] == "LIT_PREFIX":
            return PrefixTuning(length, read_field(config, "target_modules", (str, list)))
        if config.get("prefix_projection"):
            raise ValueError(
                "prefix_projection=true: this prefix was computed by a network, which the file "
                "does not hold and which is not supported here. To go on with its result, which "
                "is what the file holds, set prefix_projection to false in adapter_config.json"
            )
        if config.get("num_transformer_submodules") not in (None, 1):
            raise ValueError("num_transformer_submodules=2: only decoders can be adapted here")
        return PEFTPrefixTuning(length, "all")


@dataclass(frozen=True)
class PEFTPrefixTuning(PrefixTuning):
    """`PrefixTuning` of all layers in PEFT's layout: what a file states, not for configs."""

    @property
    def name(self) -> str:
        """What the method is called in files."""
        return PrefixTuning.__name__

    def build(self, layer: nn.Module, name: str) -> PrefixAdapter:
        """Return a prefix for ``layer``, values not yet set.

        Raises:
            ValueError: if PEFT computes something else on this model than is computed here.
        """
        adapter = super().build(layer, name)
        if adapter.peft_problem is not None:
            raise ValueError(
                f"a prefix from PEFT does not mean the same on {name!r} here: "
                f"{adapter.peft_problem}; use it with PEFT"
            )
        return adapter

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of PEFT's config; PEFT reads the sizes off the model."""
        return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.length}

    def pack(self, model: nn.Module, adapted: Sequence[Adapted]) -> dict[str, Tensor]:
        """Return PEFT's one tensor."""
        return {STACKED: stacked(model, adapted)}

    def unpack(
        self, model: nn.Module, adapted: Sequence[Adapted], tensors: Mapping[str, Tensor]
    ) -> None:
        """Load PEFT's one tensor."""
        unstack(model, adapted, tensors[STACKED])


@torch.no_grad()
def start_from_text(model: nn.Module, input_ids: Tensor) -> None:
    """Start every prefix of ``model`` from the keys and values of real tokens.

    Behind such a prefix a prompt computes what it would behind the tokens themselves, as far as no
    attention window hides them. The base runs once, without adapters, with the tokens at positions
    ``-length .. -1``.

    Args:
        model: A model with a `PrefixAdapter` in each attention module that is to start so.
        input_ids: Token ids (1, tokens); the first ``length`` are used.

    Raises:
        ValueError: if the model holds no prefix, or there are fewer tokens than it is long.
    """
    held = list(_prefixes(model))
    if not held:
        raise ValueError("the model holds no prefix; attach PrefixTuning first")
    length = held[0][1].length
    if input_ids.ndim != 2 or len(input_ids) != 1 or input_ids.shape[1] < length:
        raise ValueError(
            f"a prefix of length {length} starts from one text of at least as many tokens, got "
            f"input_ids of shape {tuple(input_ids.shape)}; take a longer text or a smaller length"
        )
    device = held[0][0].k_proj.weight.device
    cache = DynamicCache()  # of no config: windowed layers would forget the first tokens
    training = [module for module in model.modules() if module.training]
    active = [adapter for _, adapter in held if adapter.active]
    for adapter in active:
        adapter.active = False
    model.eval()  # no dropout, and checkpointing would drop the cache
    try:
        model(
            input_ids=input_ids[:, :length].to(device),
            position_ids=torch.arange(-length, 0, device=device)[None],
            past_key_values=cache,
            use_cache=True,
        )
    finally:
        for adapter in active:
            adapter.active = True
        for module in training:
            module.training = True
    for layer, adapter in held:
        stored: Any = cache.layers[layer.layer_idx]
        adapter.set_keys_values(stored.keys[0], stored.values[0])


def _prefixes(model: nn.Module) -> Iterator[tuple[Any, PrefixAdapter]]:
    """Yield attention modules with their prefixes."""
    for module in model.modules():
        adapter = module._modules.get("adapter")
        if isinstance(adapter, PrefixAdapter):
            yield module, adapter
