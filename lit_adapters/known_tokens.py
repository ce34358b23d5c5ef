"""The new tokens of a model's adapters, and the tokenizer that is to make them."""

from typing import Any

from torch import nn

from lit_adapters.adapters import NewRows
from lit_adapters.adapters.new_tokens import teach_tokens
from lit_adapters.attachment import adapted_layers


def teach_held(model: nn.Module, tokenizer: Any) -> None:
    """Let ``tokenizer`` know the new tokens whose rows ``model`` holds; else none would be trained.

    Raises:
        ValueError: if it gives one of them another row.
    """
    for *_, adapter in adapted_layers(model):
        if not isinstance(adapter, NewRows):
            continue
        teach_tokens(tokenizer, adapter.spec.tokens)
        for token, row in zip(adapter.spec.tokens, adapter.spec.ids, strict=True):
            here = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else row
            if here != row:
                raise ValueError(
                    f"the new token {token!r} is row {row} of the model, and this tokenizer gives "
                    f"it id {here}: take the tokenizer that was given to `attach` or `load_adapter`"
                )
