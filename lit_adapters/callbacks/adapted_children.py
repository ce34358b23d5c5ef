"""Which children of a LightningModule are the models that hold adapters."""

from torch import nn

from lit_adapters.attachment import adapted_layers


def adapted_children(module: nn.Module) -> dict[str, nn.Module]:
    """What was adapted in a LightningModule, by attribute name.

    A direct child that holds adapters inside is a model of its own; adapters directly on children
    mean that the LightningModule itself is the model.
    """
    if any("." not in name for name, *_ in adapted_layers(module)):
        return {"": module}
    return {name: child for name, child in module.named_children() if any(adapted_layers(child))}
