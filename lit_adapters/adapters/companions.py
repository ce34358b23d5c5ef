"""What can be trained beside the adapters of a method: whole modules, biases, new tokens."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import nn

from lit_adapters.adapters.base import Adapted, AdapterSpec, Part
from lit_adapters.adapters.fields import read_field, shown
from lit_adapters.adapters.new_tokens import NewRows, new_tokens, teach_tokens
from lit_adapters.adapters.whole import Bias, TrainedCopy, WholeModules, biases, within

PEFT_BIAS: dict[Bias, str] = {"none": "none", "adapter": "lora_only", "all": "all"}


@dataclass(frozen=True, kw_only=True)
class WithCompanions(AdapterSpec):
    """Settings of a method whose adapters have company; its subclass adds those of the method.

    Args:
        modules_to_save: Name endings of modules that are trained whole, as copies that travel in
            the adapter file: a new head, norms. They get no adapter of the method, nor does what is
            inside them.
        bias: Biases that are trained as well: none, those of adapted layers (adapter), or all.
        new_tokens: Texts of tokens whose rows of the embedding and the output head are trained and
            travel in the adapter file. The tokenizer learns those it lacks, and rows are added
            where the model has too few. A number is the id of a token that exists.
    """

    text_field: ClassVar[str] = "new_tokens"
    companion_fields: ClassVar[Set[str]] = frozenset(  # for `peft_fields`
        {"bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
    )
    notes_read: ClassVar[Set[str]] = frozenset({"new_tokens"})

    modules_to_save: list[str] | None = None
    bias: Bias = "none"
    new_tokens: list[str | int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        whole, tokens = self.modules_to_save, self.new_tokens
        if whole is not None and not (
            isinstance(whole, list) and whole and all(isinstance(w, str) and w for w in whole)
        ):
            raise ValueError(
                "modules_to_save must be a list of name endings such as ['lm_head'], got "
                f"{shown(whole)}"
            )
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be one of {get_args(Bias)}, got {shown(self.bias)}")
        if tokens is not None and not (
            isinstance(tokens, list)
            and tokens
            and all((isinstance(t, str) and t) or (type(t) is int and t >= 0) for t in tokens)
        ):
            raise ValueError(
                "new_tokens must be a list of texts such as ['<tool>'], or of ids, got "
                f"{shown(tokens)}"
            )

    @property
    def reads_text(self) -> bool:
        """Whether there are new tokens, which a tokenizer must number."""
        return any(isinstance(token, str) for token in self.new_tokens or ())

    def teach(self, tokenizer: Any) -> None:
        """Add the new tokens to a tokenizer."""
        teach_tokens(tokenizer, self.new_tokens or ())

    def select(self, names: list[str]) -> list[str]:
        """Leave out what is trained whole."""
        return [name for name in names if not within(name, self.modules_to_save or ())]

    def companions(
        self, model: nn.Module, names: list[str], stated: Mapping[str, Any], tokenizer: Any
    ) -> Sequence[Part]:
        """Return whole modules, biases and rows of new tokens, as far as there are any."""
        parts: list[Part] = []
        if self.modules_to_save is not None:
            parts.append(WholeModules(self.modules_to_save))
        if self.bias != "none":
            parts.append(biases(model, self.bias, names, self.modules_to_save or ()))
        if self.new_tokens is not None:
            parts.append(new_tokens(model, names, self.new_tokens, stated, tokenizer))
        return parts

    def companions_to_peft(self, adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return their fields of an ``adapter_config.json``."""
        rows = {one.name: one.adapter for one in adapted if isinstance(one.adapter, NewRows)}
        copies = [one.adapter for one in adapted if isinstance(one.adapter, TrainedCopy)]
        whole = list(dict.fromkeys(c.root for c in copies if isinstance(c.spec, WholeModules)))
        own = {name: list(row.spec.ids) for name, row in rows.items() if row.source is None}
        return {
            "bias": PEFT_BIAS[self.bias],
            "modules_to_save": whole or None,
            "trainable_token_indices": own or None,
        }


def companions_from_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of companions that an ``adapter_config.json`` states.

    Raises:
        ValueError: if a field is malformed, or asks for what is not done here.
    """
    if config.get("ensure_weight_tying") and config.get("modules_to_save"):
        raise ValueError(
            "ensure_weight_tying with modules_to_save: one trained copy for two tied modules is "
            "not supported; merge the adapter with PEFT instead"
        )
    return {
        "modules_to_save": read_field(config, "modules_to_save", list, None) or None,
        "bias": _read_bias(config),
        "new_tokens": _read_tokens(config),
    }


def rows_apart(adapted: Sequence[Adapted]) -> bool:
    """Whether no layer holds both new rows and another adapter, which PEFT does not combine."""
    rows = {one.name for one in adapted if isinstance(one.adapter, NewRows)}
    return not any(one.name in rows for one in adapted if one.adapter.slot != NewRows.slot)


def _read_bias(config: Mapping[str, Any]) -> Bias:
    said = read_field(config, "bias", str, "none")
    ours = next((mode for mode, theirs in PEFT_BIAS.items() if theirs == said), None)
    if ours is None:
        raise ValueError(f"bias={said!r} is unknown; expected one of {list(PEFT_BIAS.values())}")
    return ours


def _read_tokens(config: Mapping[str, Any]) -> list[str | int] | None:
    """PEFT lists ids, or lists of ids by layer."""
    said = read_field(config, "trainable_token_indices", (list, dict), None)
    lists = list(said.values()) if isinstance(said, dict) else [said]
    if not said:
        return None
    if any(ids != lists[0] for ids in lists):
        raise ValueError(
            f"trainable_token_indices={shown(said)}: rows that differ between layers are not "
            "supported"
        )
    if not isinstance(lists[0], list) or not all(type(row) is int for row in lists[0]):
        raise ValueError(f"trainable_token_indices must be lists of token ids, got {shown(said)}")
    return lists[0]
