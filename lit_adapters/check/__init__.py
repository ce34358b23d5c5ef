"""What a fit on many devices would refuse, hold and count, found out on a machine without them."""

from lit_adapters.check.findings import Findings, examine
from lit_adapters.check.shares import Share, rank_bytes

__all__ = ["Findings", "Share", "examine", "rank_bytes"]
