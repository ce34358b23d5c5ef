"""What an initialiser is, and how its random choices are seeded."""

import hashlib
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The two factors of ``delta W = scale * B A``, fp32."""

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)


class Initialiser(Protocol):
    """A frozen dataclass of settings that, called on one frozen matrix, returns its factors."""

    @property
    def reads_weight(self) -> bool:
        """Whether the values of ``weight`` matter; if not, a meta tensor of its shape is passed."""

    @property
    def reads_gradient(self) -> bool | Literal["factored"]:
        """Whether it needs ``gradient``, estimated on real batches; perhaps as `Factored`."""

    @property
    def pins_origin(self) -> bool:
        """Whether ``B A`` is not zero, so that the adapter has to remember where it started."""

    def __call__(
        self,
        weight: Tensor,  # (out, in), fp32
        rank: int,
        scale: float,
        *,
        generator: torch.Generator,
        lookup: bool = False,
        gradient: Any = None,  # (out, in), fp32; a Tensor, or `Factored` if that is read
    ) -> Factors:
        """Return the factors for ``weight``.

        ``lookup`` says that the layer is indexed (an embedding): a column that no training example
        touches should stay where it is, so where a start has a choice, ``A`` is what is zero.
        """


def named_generator(name: str, seed: int | None = None) -> torch.Generator:
    """A CPU generator whose state depends on ``name`` and ``seed`` alone.

    Layers draw the same numbers whatever the order of attaching, the device, the number of ranks
    or other use of the global generator. ``seed=None`` takes the global seed (``seed_everything``).
    """
    seed = torch.initial_seed() if seed is None else seed
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
