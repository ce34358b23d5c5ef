"""Which children of a LightningModule are the models that hold adapters."""

from collections.abc import Iterator

from torch import nn

from lit_adapters.adapters import METHOD
from lit_adapters.attachment import adapted_layers


def adapted_children(module: nn.Module) -> dict[str, nn.Module]:
    """What was adapted in a LightningModule, by attribute name.

    A direct child that holds adapters inside is a model of its own; adapters directly on children
    mean that the LightningModule itself is the model. A child whose parts were adapted by different
    settings is a container of models, such as a `ModuleList`.
    """
    if any("." not in name for name, *_ in adapted_layers(module)):
        return {"": module}
    return {
        name: model for key, child in module.named_children() for name, model in _models(key, child)
    }


def _models(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    held = list(adapted_layers(module, METHOD))
    if not held:
        return
    is_one = all(one.adapter.spec == held[0].adapter.spec for one in held)
    if is_one or any("." not in one.name for one in held):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _models(f"{name}.{key}", child)
