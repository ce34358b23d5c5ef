"""What an 8-bit optimizer of bitsandbytes did not pack, and how to have it packed."""

from torch import float32, uint8
from torch.optim import Optimizer

BLOCK = 256  # elements that share a scale


def unpacked(optimizer: Optimizer) -> str | None:
    """Say so if an optimizer that was to keep 8-bit moments keeps most of them in fp32.

    bitsandbytes packs the moments of tensors with ``min_8bit_size`` elements (4096) or more, which
    a low-rank factor of a small model does not have.

    Args:
        optimizer: After its first step. Those of other packages are passed over.
    """
    settings = getattr(optimizer, "args", None)
    if getattr(settings, "optim_bits", None) != 8:
        return None
    first = [state["state1"] for state in optimizer.state.values() if "state1" in state]
    plain = [moment.numel() for moment in first if moment.dtype == float32]
    packed = [moment.numel() for moment in first if moment.dtype == uint8]
    if sum(plain) <= sum(packed):
        return None
    return (
        f"{type(optimizer).__name__} keeps the moments of {len(plain)} of {len(first)} tensors in "
        f"fp32: they have fewer elements (at most {max(plain):,}) than "
        f"min_8bit_size={getattr(settings, 'min_8bit_size', None)}. To have them packed, give the "
        f"optimizer a smaller min_8bit_size; below its block of {BLOCK} little is saved"
    )
