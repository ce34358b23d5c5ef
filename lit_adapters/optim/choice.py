"""Which layers GaLore projects, and why not the others."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.optim.galore_settings import Projection
from lit_adapters.optim.projected_linear import SHADOW
from lit_adapters.optim.projection import sides
from lit_adapters.optim.rows import is_cut
from lit_adapters.optim.shadow import matrix_shape


def choose_layers(
    layers: Mapping[str, nn.Module], stepped: Set[int], settings: Projection, cut: bool = False
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers to project, and why the others are not.

    Args:
        layers: By name.
        stepped: Ids of the parameters in the optimizer.
        settings: What they are projected to.
        cut: Whether ranks will hold rows of the weights, where they do not yet.

    Raises:
        ValueError: if there are none, or one cannot be projected as it is to be.
    """
    chosen: dict[str, nn.Module] = {}
    ordinary: dict[str, str] = {}
    owners: dict[int, str] = {}  # of the weights chosen
    for name, layer in layers.items():
        reason = _why_ordinary(layer, stepped, settings)
        if id(layer._parameters.get("weight")) in owners:
            reason = f"is that of {owners[id(layer.weight)]!r}"
        if reason:
            ordinary[name] = reason
            continue
        weight = layer.get_parameter("weight")
        _check_side(name, weight, settings, cut)
        owners[id(weight)] = name
        chosen[name] = layer
    if not chosen:
        listed = "; ".join(f"{name!r} {why}" for name, why in list(ordinary.items())[:3])
        raise ValueError(
            f"GaLore can project none of the {len(layers)} weights meant: {listed}. It projects "
            "matrices that are trained and in the optimizer (in an AdapterFineTuneModule with "
            "adapter=FullFineTuning()); widen targets, or lower rank or min_size"
        )
    return chosen, ordinary


def check_unstepped(layers: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
    """Raise a ValueError if the optimizer has stepped weights at their full size."""
    for name, layer in layers.items():
        if optimizer.state.get(layer.get_parameter("weight")):
            raise ValueError(
                f"the optimizer has state for {name!r} already, of the full size; GaLore must be "
                "there before the first step, and around an optimizer that makes its state in the "
                "step, not when it is built as Adagrad does"
            )


def _why_ordinary(layer: nn.Module, stepped: Set[int], settings: Projection) -> str | None:
    """Return why the weight of a layer cannot be projected; None if it can.

    Args:
        layer: The layer.
        stepped: Ids of the parameters in the optimizer.
        settings: What they are projected to.

    Raises:
        ValueError: if the layer has a shadow already, or its weight is fp16.
    """
    weight = layer._parameters.get("weight")
    if hasattr(layer, SHADOW):
        raise ValueError(
            f"a {type(layer).__name__} has a {SHADOW!r} already; is another GaLore at work on it?"
        )
    if weight is None or weight.ndim < 2:
        return "has no matrix"
    if not weight.requires_grad:
        return "is not trained"
    if id(weight) not in stepped:
        return "is not in the optimizer"
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise ValueError(
            f"GaLore cannot train weights kept in {weight.dtype}, where small updates are lost; "
            "take precision='16-mixed', 'bf16-true' or 'bf16-mixed'"
        )
    if min(matrix_shape(weight)) < max(settings.rank, settings.min_size):
        return f"is too small ({' x '.join(map(str, weight.shape))})"
    return None


def _check_side(name: str, weight: Tensor, settings: Projection, cut: bool) -> None:
    """Raise a ValueError if rows would be projected that are, or will be, spread over ranks."""
    left, _ = sides(matrix_shape(weight), settings.side)
    if (cut or is_cut(weight)) and left:
        rows, columns = matrix_shape(weight)
        raise ValueError(
            f"GaLore(side={settings.side!r}) projects the rows of {name!r} ({rows} x {columns}), "
            "and ranks hold some rows each (FSDP2). Set side='right': every rank projects its "
            "rows by itself, exactly. That is what a single device does with side='right' too; its "
            "default, the shorter side, would be another run, so say it in all that are compared "
            "or resumed"
        )
