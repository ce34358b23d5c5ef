"""How parameters are stepped: groups, schedules, and GaLore's projection around an optimizer."""

from lit_adapters.optim.build import build_optimizer
from lit_adapters.optim.choice import choose_layers
from lit_adapters.optim.decay import check_suited
from lit_adapters.optim.eight_bit import unpacked
from lit_adapters.optim.galore import GaLoreEngine
from lit_adapters.optim.galore_settings import Projection
from lit_adapters.optim.groups import fuse, hold_ratios, parameter_groups
from lit_adapters.optim.options import options_of, set_options, set_rate, take_rate
from lit_adapters.optim.projected_linear import SHADOW
from lit_adapters.optim.schedule import warmup_then

__all__ = [
    "SHADOW",
    "GaLoreEngine",
    "Projection",
    "build_optimizer",
    "check_suited",
    "choose_layers",
    "fuse",
    "hold_ratios",
    "options_of",
    "parameter_groups",
    "set_options",
    "set_rate",
    "take_rate",
    "unpacked",
    "warmup_then",
]
