"""The name of the CPU."""

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")  # Python's own `platform.processor()` is empty on Linux


def cpu_model() -> str:
    """Return the product name of the CPU, if known, else its architecture."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
