"""Fold adapters into the weights that they act beside."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_adapters.adapters import Adapted, Adapter, adapters_of
from lit_adapters.attachment import adapted_layers, check_removable, owners_of, remove_adapters
from lit_adapters.blocks import make_stock
from lit_adapters.weights import is_plain

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model, untie: bool = False) -> Model:
    """Fold every adapter into its layer's weight (fp32 sum, rounded once) and remove it.

    Args:
        model: A model with adapters.
        untie: Give a layer whose weight is tied to others a weight of its own; for a language
            model this is stated in its config.

    Returns:
        ``model`` itself, now with the classes and state-dict keys it had before `attach`.

    Raises:
        ValueError: if a weight is shared with a module outside the adapter (a tied output head),
            which merging would change too, and is not to be untied; if the method cannot be merged
            (prompts), or the model holds no adapter. Nothing is then merged.

    Should anything else stop it midway (memory, Ctrl-C), every layer is whole: it has its adapter
    or the merged weight. The model computes the same as before, and `merge` goes on there.
    """
    adapted = list(adapted_layers(model))
    if not adapted:
        raise ValueError("the model holds no adapters, so there is nothing to merge")
    check_removable(adapted)
    for name, layer, adapter in adapted:
        if type(adapter).merge_into is Adapter.merge_into:
            adapter.merge_into(layer)  # which refuses
        if not is_plain(layer):
            raise ValueError(
                f"{name!r} is quantised ({type(layer).__name__}), and rounding a merged weight to "
                "so few bits again would undo most of what was trained; load the base without "
                "quantisation, load the adapter on it, merge there and save (the `merge` command "
                "does)"
            )
    for name, layer, key, others in list(_tied(model, adapted)):
        if not untie:
            raise ValueError(
                f"the {key} of {name!r} is tied to {', '.join(map(repr, others))}; merging would "
                "change both. Pass untie=True to `merge` or `export_merged` (--untie on the "
                "command line) to give "
                f"{name!r} a weight of its own"
            )
        _untie(layer, key, model)
    for layer in {id(layer): layer for _, layer, _ in adapted}.values():
        _merge_layer(layer)
    make_stock(model)
    return model


@torch.no_grad()
def _merge_layer(layer: nn.Module) -> None:
    """Merge all adapters of one layer and remove them, or leave it as it is."""
    held = list(adapters_of(layer))
    tensors = {**layer._parameters, **layer._buffers}
    written = [tensors.get(key) for adapter in held for key in adapter.overwrites()]
    before = [(tensor, tensor.detach().clone()) for tensor in written if tensor is not None]
    try:
        for adapter in held:
            adapter.merge_into(layer)
    except BaseException:
        for tensor, value in before:
            tensor.data.copy_(value)
        raise
    remove_adapters(layer)


def _tied(
    model: nn.Module, adapted: list[Adapted]
) -> Iterator[tuple[str, nn.Module, str, list[str]]]:
    """Yield layers, and which of their weights, when merged, would also be that of others."""
    owners = owners_of(model)
    trained = {id(p) for _, layer, adapter in adapted for p in adapter.trained(layer)}
    sources: dict[str, set[int]] = {}  # whose parameters act on a layer
    for name, _, adapter in adapted:
        sources.setdefault(name, set()).add(id(adapter.source or adapter))
    for name, layer, adapter in adapted:
        for key in adapter.overwrites() & layer._parameters.keys():
            weight = layer._parameters[key]
            if weight is None or id(weight) in trained:  # nothing is written
                continue
            shared = [n for n in owners[id(weight)] if sources.get(n) != sources[name]]
            if shared:
                yield name, layer, key, shared


def _untie(layer: nn.Module, key: str, model: nn.Module) -> None:
    weight = layer.get_parameter(key)
    told: list[Any] = [module for module in model.modules() if _ties(module, weight)]
    layer.register_parameter(key, nn.Parameter(weight.detach().clone(), weight.requires_grad))
    for module in told:
        module.config.tie_word_embeddings = False
        module.config.get_text_config().tie_word_embeddings = False


def _ties(module: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` is both the embedding and the head of a language model."""
    if not isinstance(module, PreTrainedModel):
        return False
    ends = (module.get_input_embeddings(), module.get_output_embeddings())
    return all(getattr(end, "weight", None) is weight for end in ends)
