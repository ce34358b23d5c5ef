"""What the projection must know of an optimizer: whether it fits at all, and how it decays."""

import re
from typing import Literal

from torch.optim import Optimizer

Decay = Literal["decoupled", "coupled"]

# Class names without a leading Paged and an ending such as 8bit.
DECOUPLED = {"AdamW", "Lion", "Adafactor", "Muon", "AdEMAMix"}
COUPLED = {"Adam", "SGD", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop"}

_NORM = "its step is proportional to the norm of the parameter"
_START = "its step depends on how far the parameter is from its start"
_AVERAGE = "it averages parameters over steps"
UNSUITED = {
    r"LAMB": _NORM,
    r"LARS": _NORM,
    r"Prodigy.*": _START,
    r"DAdapt.*": _START,
    r"DoG|LDoG|.*DoWG": _START,
    r".*ScheduleFree.*": _AVERAGE,
    r"ASGD": _AVERAGE,
    r"LBFGS": "it evaluates the loss several times in a step",
    r"SparseAdam": "it takes sparse gradients only",
    r"SAM|GSAM|ASAM": "it moves the weights between two backward passes",
    r"GaLore.*": "it projects by itself",
    r"ZeroRedundancyOptimizer": "it shared the parameters out among the ranks when it was built",
}


def check_suited(optimizer: Optimizer, moments: str) -> None:
    """Refuse optimizers that would not do on a projected gradient what they do on a full one.

    What is stepped is zero before every step, so a step may depend on gradients only.

    Args:
        optimizer: To be projected for.
        moments: What becomes of its state at a change of subspace, as in `Projection`.

    Raises:
        ValueError: naming the optimizer and the reason.
    """
    for kind in type(optimizer).__mro__:
        for pattern, reason in UNSUITED.items():
            if re.fullmatch(pattern, _plain(kind.__name__), re.IGNORECASE):
                raise ValueError(
                    f"GaLore cannot project for {type(optimizer).__name__}: {reason}, and what it "
                    "steps here is zero before every step. Take AdamW, Lion, SGD or an 8-bit AdamW"
                )
    for group in optimizer.param_groups:
        # torch's own Adafactor has no such setting: it always scales by the parameter.
        own = type(optimizer).__name__ == "Adafactor" and "scale_parameter" not in group
        if own or group.get("scale_parameter"):
            raise ValueError(
                f"GaLore cannot project for {type(optimizer).__name__} as it is set up: {_NORM}. "
                "Take transformers.Adafactor with scale_parameter=False and relative_step=False, "
                "or AdamW"
            )
    if moments != "keep" and packs_moments(optimizer):
        raise ValueError(
            f"moments={moments!r} needs moments that can be read, and "
            f"{type(optimizer).__name__} packs them; take moments='keep'"
        )


def decay_of(optimizer: Optimizer) -> Decay:
    """Return whether weight decay shrinks the weight itself, or is added to its gradient.

    Raises:
        ValueError: if the optimizer decays and is not known, or decays at a rate it keeps secret.
    """
    decays = [group for group in optimizer.param_groups if group.get("weight_decay")]
    if any(group.get("lr") is None for group in decays):
        raise ValueError(
            f"{type(optimizer).__name__} computes its learning rate by itself (relative_step?), "
            "so GaLore cannot decay the weights at that rate; set lr, or weight_decay to 0"
        )
    for kind in type(optimizer).__mro__:
        name = _plain(kind.__name__)
        # bitsandbytes' Adam decays like AdamW.
        own = kind.__module__.startswith("bitsandbytes") and name == "Adam"
        if name in DECOUPLED or own:
            return "decoupled"
        if name in COUPLED:
            said = any(group.get("decoupled_weight_decay") for group in optimizer.param_groups)
            return "decoupled" if said else "coupled"
    if decays:
        raise ValueError(
            f"GaLore does the weight decay itself and does not know how {type(optimizer).__name__} "
            "does it; pass decay='decoupled' (as AdamW) or decay='coupled' (as SGD), or set "
            "weight_decay to 0"
        )
    return "decoupled"


def packs_moments(optimizer: Optimizer) -> bool:
    """Whether the moments are kept quantised or paged, out of reach."""
    return any(kind.__module__.startswith("bitsandbytes") for kind in type(optimizer).__mro__)


def _plain(name: str) -> str:
    return re.sub(r"(_?\d+bit|Fp8)$", "", name.removeprefix("Paged"))
