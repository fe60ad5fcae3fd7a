"""What a benchmark says of where it ran."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax


def description() -> dict[str, Any]:
    """Processor and accelerator, and the settings of JAX that change how fast a program is."""
    device = jax.devices()[0]
    return {
        "cpu": _first(Path("/proc/cpuinfo"), r"model name\s*: (.*)") or platform.processor(),
        "cores": cores(),
        "platform": device.platform,
        "device_kind": device.device_kind,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"] or "default",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cores() -> int:
    """The number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> float:
    """Free bytes of the accelerator's memory, or else of the machine's; infinite where that is not known."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    available = _first(Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB")
    return float(available) * 1024 if available else float("inf")


def versions(names: tuple[str, ...]) -> dict[str, str]:
    """The versions of Python and of the named packages, without those that are not installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _first(path: Path, pattern: str) -> str | None:
    """The first match in a file that Linux has; None on other systems."""
    found = re.search(pattern, path.read_text()) if path.exists() else None
    return found[1] if found else None
