"""LoRA: a trained product of two thin matrices beside a frozen one (arXiv 2106.09685)."""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_adapters.adapters.base import Adapted, Adapter
from lit_adapters.adapters.companions import WithCompanions, companions_from_peft, rows_apart
from lit_adapters.adapters.fields import read_field, shown
from lit_adapters.adapters.low_rank import ORIGIN_NOTE, LoRAAdapter
from lit_adapters.adapters.patterns import check_pattern, matches
from lit_adapters.adapters.taken import TAKEN_NOTE
from lit_adapters.weights import group_count, is_adaptable, matrix_shape, peft_agrees

# Starts after which PEFT subtracts the first product from the base it trains on.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRA(WithCompanions):
    """Low-rank adaptation: ``y = W x + scale * B A dropout(x)``.

    Args:
        rank: r, the inner size of the product; more than the smaller side of a layer is an error.
        alpha: Numerator of the scale; 0 leaves the base unchanged to the bit.
        dropout: Probability of zeroing an input of the branch in training (not on embeddings).
        targets: ``"all-linear"`` (every linear layer but the output head), a regular expression
            that must match a module's whole dotted name, or a list of name endings.
        rslora: ``scale = alpha / sqrt(rank)`` (arXiv 2312.03732) instead of ``alpha / rank``.
        exclude: Names to leave out: a regular expression or a list of name endings.
        layers: Keep only modules inside the decoder layers of these numbers.
        rank_pattern: Ranks of single modules, by the ending of their name (regular expressions).
        alpha_pattern: The same for alpha.
    """

    # The second is for layers beside which PEFT computes something else.
    peft_types: ClassVar[tuple[str, ...]] = ("LORA", "LIT_LORA")
    peft_fields: ClassVar[Set[str]] = WithCompanions.companion_fields | set(
        "r lora_alpha lora_dropout target_modules use_rslora use_dora exclude_modules "
        "layers_to_transform rank_pattern alpha_pattern fan_in_fan_out init_lora_weights "
        "loftq_config megatron_core qalora_group_size runtime_config "
        "eva_config corda_config lora_ga_config".split()
    )
    notes_read: ClassVar[Set[str]] = WithCompanions.notes_read | {
        "origin", "initialiser", "taken_from", "quantised_as",
    }  # fmt: skip

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    rslora: bool = False
    exclude: str | list[str] | None = None
    layers: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if type(rank) is not int or rank < 1:
                raise ValueError(
                    f"rank must be a positive integer, got {shown(name)[1:-1]}={shown(rank)}"
                )
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not _is_number(alpha) or not 0 <= alpha < 1e30:
                raise ValueError(
                    f"alpha must be a number of at least 0, got {shown(name)[1:-1]}={shown(alpha)}"
                )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1), got dropout={self.dropout!r}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_pattern(_ending(pattern), "pattern")

    def fits(self, layer: nn.Module) -> bool:
        """Whether some storage in ``weights/`` knows the matrix of ``layer``."""
        return is_adaptable(layer)

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Return rank and scale of the module called ``name``, patterns applied.

        The first key of a pattern that matches the whole name or an ending of it after a dot wins.
        """
        rank = _first_match(self.rank_pattern, name, self.rank)
        alpha = _first_match(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def build(self, layer: nn.Module, name: str) -> LoRAAdapter:
        """Return an adapter with unset factors, on the device of ``layer``."""
        rank, _ = self.rank_and_scale(name)
        out_features, in_features = matrix_shape(layer)
        limit = min(out_features // group_count(layer), in_features)
        if rank > limit:
            raise ValueError(
                f"rank {rank} exceeds min(out, in) = {limit} of {name!r}; lower `rank`, give "
                f"this module its own in `rank_pattern`, or narrow `targets`"
            )
        return self._made(layer, name)

    def _made(self, layer: nn.Module, name: str) -> LoRAAdapter:
        rank, scale = self.rank_and_scale(name)
        return self.adapter_class(self, rank, scale, self.dropout, layer)

    @property
    def adapter_class(self) -> type[LoRAAdapter]:
        """The module that these settings build."""
        return LoRAAdapter

    def rebuild(self, layer: nn.Module, name: str, stated: Mapping[str, Any]) -> LoRAAdapter:
        """Split the two halves of a file's rank again if the second is the start.

        Raises:
            ValueError: if PEFT computed something else beside this layer.
        """
        if stated.get("peft_type") == "LORA" and not peft_agrees(layer):
            raise ValueError(
                f"PEFT ran the adapter of {name!r} without its padding mode, dilation "
                "and groups, so here its factors compute something else; use it with PEFT"
            )
        origin = stated.get("origin")
        if origin not in (None, ORIGIN_NOTE, TAKEN_NOTE):
            raise ValueError(
                f"origin={origin!r} is unknown; was the folder written by a later version?"
            )
        # A file may hold more rank than its layer has use for: PEFT writes such.
        adapter = (self.of_half_rank() if origin else self)._made(layer, name)
        if origin == ORIGIN_NOTE:
            adapter.pin()
        if origin == TAKEN_NOTE:
            adapter.take()
            how = stated.get("quantised_as")
            adapter.rounding = how if isinstance(how, Mapping) else {}
            adapter.taken_from = str(stated.get("taken_from"))
        start = stated.get("initialiser")
        if isinstance(start, str):
            adapter.start_name = start
        return adapter

    def filed(self, adapters: Sequence[Adapter]) -> "LoRA":
        """Return these settings, or, for pinned adapters, the plain LoRA that their file holds."""
        low_rank = [adapter for adapter in adapters if isinstance(adapter, LoRAAdapter)]
        kinds = {(adapter.pinned, adapter.has_taken) for adapter in low_rank}
        if len(kinds) > 1:
            raise ValueError(
                "some adapters of the model have a pinned origin and some have not, which no file "
                "can state; run `initialise` over the whole model"
            )
        return self if kinds <= {(False, False)} else self.of_double_rank()

    def of_double_rank(self) -> "LoRA":
        """Return the plain LoRA that holds a pinned origin in the second half of its rank."""
        factor = math.sqrt(2) if self.rslora else 2
        return self._resized(lambda rank: 2 * rank, lambda alpha: float(alpha * factor))

    def of_half_rank(self) -> "LoRA":
        """Undo `of_double_rank`.

        Raises:
            ValueError: if a rank is odd.
        """
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if odd:
            raise ValueError(
                f"a file with a pinned origin holds twice the rank, but rank {odd[0]} is odd"
            )
        factor = math.sqrt(2) if self.rslora else 2
        return self._resized(lambda rank: rank // 2, lambda alpha: _divided(alpha, factor))

    def _resized(self, rank: Callable[[int], int], alpha: Callable[[float], float]) -> "LoRA":
        return replace(
            self,
            rank=rank(self.rank),
            alpha=alpha(self.alpha),
            rank_pattern={key: rank(value) for key, value in self.rank_pattern.items()},
            alpha_pattern={key: alpha(value) for key, value in self.alpha_pattern.items()},
        )

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the LoRA fields of an ``adapter_config.json``."""
        matrices = [one for one in adapted if isinstance(one.adapter, LoRAAdapter)]
        agrees = all(peft_agrees(o.layer) and not o.adapter.has_taken for o in matrices)
        return {
            "peft_type": "LORA" if agrees and rows_apart(adapted) else "LIT_LORA",
            "target_modules": targets,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            **self.companions_to_peft(adapted),
            "init_lora_weights": True,
        }

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether the config states LoRA without the magnitudes of DoRA."""
        return super().recognises(config) and config.get("use_dora") is not True

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "LoRA":
        """Return the settings in a PEFT LoRA config; what PEFT leaves out takes PEFT's default."""
        _refuse_unsupported(config)
        read_field(config, "use_dora", bool, False)  # `recognises` has looked at its value
        return cls(
            rank=read_field(config, "r", int, 8),
            alpha=read_field(config, "lora_alpha", (int, float), 8),
            dropout=float(read_field(config, "lora_dropout", (int, float), 0.0)),
            targets=read_field(config, "target_modules", (str, list)),
            rslora=read_field(config, "use_rslora", bool, False),
            exclude=read_field(config, "exclude_modules", (str, list), None) or None,
            layers=_as_list(read_field(config, "layers_to_transform", (int, list), None)),
            rank_pattern=read_field(config, "rank_pattern", dict, {}),
            alpha_pattern=read_field(config, "alpha_pattern", dict, {}),
            **companions_from_peft(config),
        )

    def pack(self, model: nn.Module, adapted: Sequence[Adapted]) -> dict[str, Tensor]:
        """Return what is trained in fp32; counters of a whole module stay integers."""
        return {
            key: tensor.float() if tensor.is_floating_point() else tensor
            for key, tensor in super().pack(model, adapted).items()
        }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(MOVES_BASE):
        raise ValueError(
            f"init_lora_weights={start!r}: these factors belong to a base from which PEFT "
            "subtracts their start, so on the original base they compute something else. Convert "
            "the folder with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion), which writes a plain LoRA"
        )


def _divided(product: float, factor: float) -> float:
    """The shortest number whose product with ``factor`` is ``product``, to the bit."""
    guess = product / factor
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0))
    fitting = [number for number in near if number * factor == product]
    return min(fitting or near[:1], key=lambda number: len(repr(number)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_list(value: int | list[int] | None) -> list[int] | None:
    return [value] if isinstance(value, int) else value or None  # PEFT: an empty list is no limit


def _first_match(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first key matching the end of ``name`` (PEFT's rule)."""
    for key, value in patterns.items():
        if matches(_ending(key), name, "pattern"):
            return value
    return default


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"
