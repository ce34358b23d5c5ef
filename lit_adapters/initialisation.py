"""Run an initialiser over the adapters of a whole model."""

import torch
from torch import nn

from lit_adapters.adapters import LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.initialisers import Initialiser, named_generator
from lit_adapters.weights import is_lookup, matrix_shape, read_weight


def initialise(model: nn.Module, initialiser: Initialiser, seed: int | None = None) -> list[str]:
    """Give every adapter of ``model`` the start that ``initialiser`` computes, in place.

    Args:
        model: A model with attached adapters; its own weights are read, never written.
        initialiser: Such as ``Kaiming()``.
        seed: Seeds the random choices together with each layer's name; None takes the global seed.

    Returns:
        The names of the initialised layers.

    Raises:
        ValueError: if the model holds no adapters.
        TypeError: if an adapter has no low-rank factors.
    """
    adapted = list(adapted_layers(model))
    if not adapted:
        raise ValueError("the model holds no adapters; call `attach(model, spec)` first")
    for name, layer, adapter in adapted:
        if not isinstance(adapter, LoRAAdapter):
            raise TypeError(
                f"{type(initialiser).__name__} sets low-rank factors, but {name!r} holds a "
                f"{type(adapter).__name__}"
            )
        shape = matrix_shape(layer)
        weight = (
            read_weight(layer) if initialiser.reads_weight else torch.empty(shape, device="meta")
        )
        factors = initialiser(
            weight,
            adapter.rank,
            adapter.scale,
            generator=named_generator(name, seed),
            lookup=is_lookup(layer),
        )
        adapter.set_factors(factors)
    return [name for name, *_ in adapted]
