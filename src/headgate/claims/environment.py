"""What a measurement ran on: versions and hardware, without anything that names the machine or its user."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

__all__ = ["available_cores", "describe_hardware", "describe_versions"]

_PACKAGES = ("headgate", "torch", "numpy", "scipy", "scikit-learn", "joblib")


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_versions() -> dict[str, str]:
    """Package → version, Python included."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            import headgate

            versions[package] = headgate.__version__ if package == "headgate" else "not installed"
    return versions


def describe_hardware() -> dict[str, str | int | float]:
    """Processor, cores, memory (GiB) and operating system."""
    hardware: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": available_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        hardware["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return hardware


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
