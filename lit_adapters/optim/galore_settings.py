"""The settings of GaLore."""

from dataclasses import dataclass
from typing import Literal, get_args

from lit_adapters.optim.decay import Decay
from lit_adapters.optim.projection import SVD, Side

Moments = Literal["keep", "reset", "rotate"]


@dataclass(frozen=True)
class Projection:
    """How gradients are projected.

    Args:
        rank: Directions kept of each gradient.
        update_gap: Optimizer steps between two choices of the subspace.
        scale: Factor of every update (the paper's alpha); weight decay does not know it.
        side: ``std`` projects the shorter dimension, ``reverse_std`` the longer; ``full`` both.
        svd: ``randomised`` holds .999 of what the exact one does, in a tenth of the time for ranks
            far below the weight's; ``exact`` is torch's decomposition, as in the paper.
        moments: What becomes of the optimizer's state when the subspace changes: keep it, as the
            paper does, start anew, or rotate the first moment into the new subspace.
        min_size: Weights whose shorter side is below this stay ordinary; so do, always, those whose
            shorter side is below ``rank``.
        decay: Whether the optimizer's weight decay is that of AdamW (decoupled) or of SGD
            (coupled); auto knows the usual optimizers.
    """

    rank: int
    update_gap: int = 200
    scale: float = 0.25
    side: Side = "std"
    svd: SVD = "randomised"
    moments: Moments = "keep"
    min_size: int = 0
    decay: Literal["auto"] | Decay = "auto"

    def __post_init__(self) -> None:
        """Check every field."""
        for name, least in {"rank": 1, "update_gap": 1, "min_size": 0}.items():
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale!r}")
        choices = {
            "side": get_args(Side),
            "svd": get_args(SVD),
            "moments": get_args(Moments),
            "decay": ("auto", *get_args(Decay)),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
