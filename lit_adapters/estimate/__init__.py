"""The memory of a training step, found out on a model that has shapes and no numbers."""

from lit_adapters.estimate.estimation import Estimate, estimate, largest_batch
from lit_adapters.estimate.rehearsal import Rehearsal
from lit_adapters.estimate.shapes import Training

__all__ = ["Estimate", "Rehearsal", "Training", "estimate", "largest_batch"]
