"""Which parameters decay and which learn faster, and the fused kernel where it exists."""

from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer


def parameter_groups(
    model: nn.Module, lr_ratio: float = 1.0, embedding_lr: float | None = None
) -> list[dict[str, Any]]:
    """Split trainable parameters by decay and learning rate, for any optimizer.

    Matrices take the optimizer's decay, vectors (biases, norm weights, DoRA magnitudes) none. The
    rates of LoRA+ (arXiv 2402.12354) are stated in the groups as ``lr_ratio`` and ``absolute_lr``;
    they take effect with `hold_ratios`.

    Args:
        model: Holds the trainable parameters.
        lr_ratio: Rate of ``lora_B`` and of vectors over that of everything else; the paper
            suggests about 16.
        embedding_lr: Rate of adapters on embeddings, whatever the optimizer's.

    Raises:
        ValueError: if nothing is trainable, or a rate is not positive.
    """
    for name, value in {"lr_ratio": lr_ratio, "embedding_lr": embedding_lr}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    embedded = {
        id(parameter)
        for module in model.modules()
        if embedding_lr is not None and isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = getattr(parameter, "whole_ndim", parameter.ndim) < 2  # FSDP1 flattens all
        is_fast = lr_ratio != 1 and (is_vector or name.rpartition(".")[2] == "lora_B")
        rate = "embedding" if id(parameter) in embedded else "fast" if is_fast else "plain"
        groups.setdefault((is_vector, rate), []).append(parameter)
    if not groups:
        raise ValueError("no parameter of the model is trainable; attach an adapter first")
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if lr_ratio != 1 and not any(name.endswith("lora_B") for name in names):
        raise ValueError(
            f"lr_ratio={lr_ratio} is LoRA+'s, and nothing trained here is a lora_B; leave it at 1"
        )
    if embedding_lr is not None and not any(rate == "embedding" for _, rate in groups):
        raise ValueError(
            f"embedding_lr={embedding_lr}, but no embedding holds an adapter; leave it out, or "
            "add the embedding to `targets`"
        )
    rates: dict[str, dict[str, Any]] = {
        "plain": {},
        "fast": {"lr_ratio": lr_ratio},
        "embedding": {"absolute_lr": embedding_lr},
    }
    return [
        {"params": groups[key], **({"weight_decay": 0.0} if key[0] else {}), **rates[key[1]]}
        for key in sorted(groups, key=lambda key: (key[0], list(rates).index(key[1])))
    ]


def hold_ratios(optimizer: Optimizer) -> None:
    """Apply the rates that `parameter_groups` states, and hold them at every step from now on.

    A schedule may treat all groups alike (OneCycleLR) or have a floor (cosine with ``eta_min``),
    which would change their ratio: before each step it is set again from the first group without
    a ratio of its own. Call it before the schedule is built.

    Raises:
        ValueError: if every group has a ratio of its own, so that there is nothing to compare to.
    """
    groups = optimizer.param_groups
    if not any(_is_relative(group) for group in groups):
        return
    if _is_relative(groups[0]):
        raise ValueError(
            "every trainable parameter has a learning rate of its own kind (lr_ratio or "
            "embedding_lr), so there is no ordinary one that they relate to; leave these out and "
            "set the optimizer's lr"
        )
    base = groups[0]["lr"]
    if base == 0 and any("absolute_lr" in group for group in groups):
        raise ValueError("embedding_lr relates to the optimizer's lr, which is 0")
    for group in groups:
        if "absolute_lr" in group:
            group["lr_ratio"] = group["absolute_lr"] / base
    set_ratios(optimizer)
    optimizer.register_step_pre_hook(set_ratios)


def set_ratios(optimizer: Optimizer, *_: Any) -> None:
    """Set every group's rate to its ratio times the first group's; a hook before each step."""
    base = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups[1:]:
        if "lr_ratio" in group:
            group["lr"] = base * group["lr_ratio"]


def _is_relative(group: dict[str, Any]) -> bool:
    return "lr_ratio" in group or "absolute_lr" in group


def fuse(optimizer: Optimizer) -> None:
    """Switch on the fused kernel where the optimizer has one and the user did not choose.

    An adapter is hundreds of small tensors: one fused call takes a quarter of the default's time.
    Of sharded ones (DTensor) torch fuses the steps of Adam and AdamW alone.
    """
    for group in optimizer.param_groups:
        fusable = all(p.is_floating_point() and p.device.type != "meta" for p in group["params"])
        if any(hasattr(p, "full_tensor") for p in group["params"]):
            fusable = fusable and isinstance(optimizer, Adam | AdamW)
        if "fused" in group and group["fused"] is None and not group.get("foreach") and fusable:
            group["fused"] = True
