"""How adapters are stepped: parameter groups and schedules."""

from lit_adapters.optim.groups import fuse, parameter_groups
from lit_adapters.optim.schedule import warmup_then

__all__ = ["fuse", "parameter_groups", "warmup_then"]
