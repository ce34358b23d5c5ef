"""How adapters are stepped: parameter groups and schedules."""

from lit_adapters.optim.groups import fuse, hold_ratios, parameter_groups
from lit_adapters.optim.options import options_of, set_options
from lit_adapters.optim.schedule import warmup_then

__all__ = [
    "fuse",
    "hold_ratios",
    "options_of",
    "parameter_groups",
    "set_options",
    "warmup_then",
]
