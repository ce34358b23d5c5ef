"""Where a low-rank adapter starts: pure functions of the frozen matrix, one file per idea."""

from lit_adapters.initialisers.base import Factors, Initialiser, named_generator
from lit_adapters.initialisers.noise import Gaussian, Kaiming

__all__ = ["Factors", "Gaussian", "Initialiser", "Kaiming", "named_generator"]
