"""What a measurement names its machine by."""

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch


def named(device: str, *packages: str) -> str:
    """Return the processor or GPU, and the versions of torch and other packages."""
    versions = [f"{package} {version(package)}" for package in ("torch", *packages)]
    return ", ".join([processor(device), *versions])


def processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", known.read_text()) if known.exists() else None
    return f"CPU, {found[1] if found else platform.processor() or platform.machine()}"
