"""New tokens: rows of the embedding and of the output head, trained and saved by themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_adapters.adapters.base import Adapted, Adapter, Part, bias_of
from lit_adapters.adapters.fields import shown

SPARE = 1024  # rows that may be missing beside those of the tokens; more is a mistake
LONGEST = 1000  # characters of a token
KEY = "token_adapter.trainable_tokens_delta"  # PEFT's; it holds rows, not differences


@dataclass(frozen=True)
class NewTokens(Part):
    """Train single rows of the input embedding and of the output head.

    Args:
        tokens: Their texts, or ids where no text is known.
        ids: Their rows, in the same order.
        targets: Dotted names of embedding and head.
    """

    remedy: ClassVar[str] = "leave out `new_tokens`"

    tokens: tuple[str | int, ...]
    ids: tuple[int, ...]
    targets: tuple[str, ...]
    exclude: None = None
    layers: None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has one row for each token."""
        return isinstance(layer, nn.Embedding | nn.Linear)

    def build(self, layer: nn.Module, name: str) -> "NewRows":
        """Return rows without values."""
        return NewRows(self, name, layer.get_parameter("weight").shape[1])

    def build_all(
        self, layers: Mapping[str, nn.Module], stated: Mapping[str, Any]
    ) -> list[Adapted]:
        """Let a tied output head use the rows of the embedding."""
        adapted: list[Adapted] = []
        for name, layer in layers.items():
            owner = next((o.adapter for o in adapted if o.layer.weight is layer.weight), None)
            made = NewRows(self, name, 0, owner) if owner else self.build(layer, name)
            adapted.append(Adapted(name, layer, made))
        return adapted


def teach_tokens(tokenizer: Any, tokens: Sequence[str | int]) -> None:
    """Add to ``tokenizer`` the texts that it lacks; decoded answers will show them."""
    texts = [token for token in tokens if isinstance(token, str)]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


def new_tokens(
    model: nn.Module,
    adapted: Sequence[str],
    tokens: Sequence[str | int],
    stated: Mapping[str, Any],
    tokenizer: Any,
) -> NewTokens:
    """Return the part that trains the rows of ``tokens`` in ``model``.

    Args:
        model: Holds a Hugging Face model.
        adapted: Names of the layers with adapters, which tell which model is meant.
        tokens: Texts, or ids of rows that exist.
        stated: The fields of an adapter file's two JSON files; empty when attaching. Where the
            file knows the texts, a tokenizer decides about the ids, else the file.
        tokenizer: Learns the texts that it lacks; None takes the ids of the file.

    Raises:
        ValueError: if a text cannot be resolved, an id has no row, two tokens share one, or the
            model has no token embedding.
    """
    root = _language_model(model, adapted)
    embedding = root.get_input_embeddings() if root is not None else None
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            "new tokens (trainable_token_indices) need a Hugging Face model with a token embedding"
        )
    ids = _ids(_texts(tokens, stated), tokens, tokenizer)
    rows = len(embedding.weight)
    furthest = rows + len(ids) + SPARE
    for token, row in zip(_texts(tokens, stated), ids, strict=True):
        if row >= furthest or (not isinstance(token, str) and row >= rows):
            raise ValueError(
                f"new_tokens: id {row} lies beyond the {rows} rows of the embedding. Name a new "
                "token by its text, which adds a row; for a folder of another library, resize the "
                "base as it was resized there"
            )
    names = {id(module): name for name, module in model.named_modules()}
    head = root.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    ends = [embedding] if head is None else [embedding, head]
    listed = stated.get("trainable_token_indices")
    if isinstance(listed, list) and not is_tied:
        ends = [embedding]  # what PEFT means by a list
    elif isinstance(listed, Mapping) and not is_tied:
        ends = [end for end in ends if any(names[id(end)].endswith(key) for key in listed)]
    if not ends:
        raise ValueError(f"trainable_token_indices={listed!r} names neither embedding nor head")
    return NewTokens(tuple(_texts(tokens, stated)), ids, tuple(names[id(end)] for end in ends))


def _language_model(model: nn.Module, adapted: Sequence[str]) -> Any:
    """The outermost Hugging Face model that holds adapted layers; None if there is none."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not name or layer.startswith(f"{name}.") for layer in adapted)
        is_outermost = not any(not other or name.startswith(f"{other}.") for other in found)
        if isinstance(module, PreTrainedModel) and inside and is_outermost:
            found[name] = module
    if len(found) > 1:
        raise ValueError(
            f"new_tokens: several language models are adapted here, {sorted(found)}; attach to one "
            "of them at a time"
        )
    return next(iter(found.values()), None)


def _texts(tokens: Sequence[str | int], stated: Mapping[str, Any]) -> Sequence[str | int]:
    """The tokens with the texts that ``lit_adapters.json`` knows."""
    known = stated.get("new_tokens")
    if known is None:
        return tokens
    if (
        not isinstance(known, list)
        or len(known) != len(tokens)
        or not all(
            isinstance(text, str) or text == token
            for text, token in zip(known, tokens, strict=True)
        )
    ):
        raise ValueError(f"new_tokens={shown(known)} does not fit trainable_token_indices")
    for text in known:
        is_sound = not isinstance(text, str) or not any("\ud800" <= c <= "\udfff" for c in text)
        if isinstance(text, str) and not (is_sound and 0 < len(text) <= LONGEST):
            raise ValueError(
                f"new_tokens: {shown(text)} is no token; expected a text of 1 to {LONGEST} "
                "characters"
            )
    return known


def _ids(
    texts: Sequence[str | int], tokens: Sequence[str | int], tokenizer: Any
) -> tuple[int, ...]:
    if tokenizer is not None:
        teach_tokens(tokenizer, texts)
    ids = []
    for text, token in zip(texts, tokens, strict=True):
        if isinstance(text, str) and tokenizer is not None:
            number = tokenizer.convert_tokens_to_ids(text)
            if number is None:
                raise ValueError(
                    f"new_tokens: the tokenizer cannot hold {shown(text)} as one token"
                )
            ids.append(int(number))
        elif isinstance(token, str):
            raise ValueError(f"new_tokens={list(tokens)!r} needs a tokenizer: pass tokenizer=...")
        else:
            ids.append(token)
    if len(set(ids)) < len(ids):
        raise ValueError(f"new_tokens={list(texts)!r} names the same row twice: ids {ids}")
    return tuple(ids)


class NewRows(Adapter):
    """The trained ``rows`` (tokens, width), fp32, of an embedding or an output head.

    An output head that is tied to the embedding has none of its own but uses those of ``source``.
    Where the model has too few rows, rows are added to it that start at the mean of all others; an
    existing row starts where it is.
    """

    slot: ClassVar[str] = "new_rows"
    spec: NewTokens
    rows: nn.Parameter | None
    ids: Tensor

    def __init__(
        self, spec: NewTokens, name: str, width: int, source: Adapter | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layer_name = name
        object.__setattr__(self, "source", source)  # not as a child: it would be saved twice
        values = torch.empty(len(spec.ids), width, device="meta", dtype=torch.float32)
        self.register_parameter("rows", None if source else nn.Parameter(values))
        ids = torch.empty(len(spec.ids), device="meta", dtype=torch.long)
        self.register_buffer("ids", ids, persistent=False)

    def claim(self, layer: nn.Module, model: nn.Module) -> None:
        """Add rows to the layer's weight where it has too few."""
        rows = len(layer.get_parameter("weight"))
        if self.grown_from is None:
            self.grown_from = rows if self.source is None else self.source.grown_from
        _resize(layer, max(rows, *(row + 1 for row in self.spec.ids)), model)

    def release(self, layer: nn.Module, model: nn.Module) -> None:
        """Take the added rows away."""
        if self.grown_from is not None:
            _resize(layer, self.grown_from, model)

    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Start from the rows as they are."""
        self._know_ids()
        if self.rows is not None:
            with torch.no_grad():
                self.rows.copy_(layer.get_parameter("weight")[self.ids])

    def _know_ids(self) -> None:
        self.ids.copy_(torch.tensor(self.spec.ids))

    @property
    def values(self) -> Tensor:
        """The rows (tokens, width), fp32."""
        rows = self.rows if self.source is None else self.source.rows
        assert isinstance(rows, Tensor)
        return rows

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return ``output`` with what belongs to the new tokens replaced."""
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(layer, nn.Embedding):
            hit = x[..., None] == self.ids
            found = F.embedding(hit.int().argmax(-1), self.values)
            found = found * getattr(layer, "embed_scale", 1.0)
            return torch.where(hit.any(-1, keepdim=True), found.to(output.dtype), output)
        bias = bias_of(layer)
        logits = F.linear(x, self.values.to(x.dtype), None if bias is None else bias[self.ids])
        output[..., self.ids] = logits.to(output.dtype)  # a second copy of all logits is too much
        return output

    def computes_like(self, other: Adapter) -> bool:
        """Return whether the other has the same rows."""
        return isinstance(other, NewRows) and (self.spec.ids, self.spec.tokens) == (
            other.spec.ids,
            other.spec.tokens,
        )

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """Write the rows into the weight."""
        weight = layer.get_parameter("weight")
        weight[self.ids] = self.values.to(weight.dtype)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the rows in PEFT's layout, in the order of the ids."""
        return {} if self.rows is None else {KEY: self.rows}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over the rows."""
        self._know_ids()
        if self.rows is not None:
            self.rows.copy_(tensors[KEY])

    def frozen_copies(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the weight whose rows are replaced."""
        return {"token_adapter.base_layer.weight": layer.get_parameter("weight")}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Say so if another tokenizer has moved the tokens since the training."""
        listed = config.get("trainable_token_indices")
        ids = next(iter(listed.values()), None) if isinstance(listed, dict) else listed
        if list(self.spec.ids) == ids:
            return None
        return (
            f"This tokenizer gives the new tokens ids {list(self.spec.ids)}, and that of the "
            f"training gave {ids}: load the folder with that tokenizer, or without any"
        )

    def notes(self) -> dict[str, Any]:
        """Return the texts of the tokens, which tell another tokenizer what the rows mean."""
        return {"new_tokens": list(self.spec.tokens)}

    def extra_repr(self) -> str:
        """Return the tokens for ``print(model)``."""
        return ", ".join(map(repr, self.spec.tokens))


@torch.inference_mode(False)  # else the weight could never be trained beside
@torch.no_grad()
def _resize(layer: nn.Module, rows: int, model: nn.Module) -> None:
    """Give an embedding or head ``rows`` rows; new ones are the mean of the others."""
    weight = layer.get_parameter("weight")
    added = rows - len(weight)
    if added > 0:
        mean = weight.mean(0, keepdim=True, dtype=torch.float32).to(weight.dtype)
        weight.data = torch.cat([weight.data, mean.expand(added, -1)])
    elif added < 0:
        weight.data = weight.data[:rows].clone()
    if isinstance(layer, nn.Linear):
        layer.out_features = rows
        if layer.bias is not None and len(layer.bias) != rows:
            layer.bias.data = F.pad(layer.bias.data, (0, rows - len(layer.bias)))
        return
    setattr(layer, "num_embeddings", rows)  # noqa: B010 - typed as a module or tensor
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_input_embeddings() is layer:
            module.config.get_text_config().vocab_size = rows
            if hasattr(module, "vocab_size"):
                setattr(module, "vocab_size", rows)  # noqa: B010 - typed as a module or tensor
