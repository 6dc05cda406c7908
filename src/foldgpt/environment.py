"""What a result was measured with: versions, hardware, date."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PACKAGES = ("foldgpt", "torch", "transformers", "accelerate", "peft", "safetensors", "numpy")


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, as plain JSON values.

    Returns:
        A dict with the version of Python and of each package ("foldgpt", "python", "torch", …; None if not
        installed), "cpu", "num_cores" (that this process may use), "ram_gb" (10⁹ bytes), "gpu" (name or
        None), "os", "torch_threads", "omp_wait_policy" (how OpenMP's
        threads wait, if that is set: with "passive", small operations pay for waking them) and "date" (UTC, ISO 8601).
    """
    import psutil
    import torch

    return {
        "python": platform.python_version(),
        **{package: _version_of(package) for package in _PACKAGES},
        "cpu": _cpu_name(),
        "num_cores": _num_cores(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "os": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version_of(package: str) -> str | None:
    if package == "torch":
        # What is installed may not name the build (CUDA, CPU), which the module does.
        import torch

        return str(torch.__version__)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _num_cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
