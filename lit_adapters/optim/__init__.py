"""How adapters are stepped: parameter groups and schedules."""

from lit_adapters.optim.groups import fuse, hold_ratios, parameter_groups
from lit_adapters.optim.schedule import warmup_then

__all__ = ["fuse", "hold_ratios", "parameter_groups", "warmup_then"]
