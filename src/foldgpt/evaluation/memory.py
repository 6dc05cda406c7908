"""Peak memory of loading and running a model, measured in a process of its own."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from foldgpt.errors import ArtifactError
from foldgpt.evaluation.errors import MeasurementError, NotEnoughMemoryError
from foldgpt.formats import dtype_name

_PROMPT_TOKENS = 128
_DECODE_TOKENS = 8
#: What the error of a Python that ran out of memory has in it: its own, PyTorch's on a CPU and an accelerator, and
#: the system's.
_OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "out of memory", "Cannot allocate memory")


@dataclass(frozen=True)
class PeakMemory:
    """Memory of a fresh process that loads a model, reads a prompt of 128 tokens and decodes 8 more.

    A model with fewer positions reads a shorter prompt.

    Attributes:
        baseline_rss: resident bytes after the imports, before loading: Python, PyTorch and transformers.
        peak_rss: the most resident bytes from then on, baseline included. Pages of a memory-mapped file of
            weights count as soon as they are touched.
        peak_accelerator: the most bytes that PyTorch had allocated on a CUDA device; None on other devices.
        device: where the model ran.
        dtype: what it was loaded as.
    """

    baseline_rss: int
    peak_rss: int
    peak_accelerator: int | None
    device: str
    dtype: str


def peak_memory(
    model_folder: str | Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
) -> PeakMemory:
    """Measure the peak memory of a saved model in a subprocess.

    Args:
        model_folder: a Hugging Face folder that `AutoModelForCausalLM` can load.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda" or "cuda:0" and the like.
        trust_remote_code: run modelling code that comes with the model.

    Raises:
        ArtifactError: there is no such folder.
        NotEnoughMemoryError: the process ran out of memory, or was killed, which is most likely the same.
        MeasurementError: it failed otherwise; the message ends with what it said of that.
    """
    if not Path(model_folder).is_dir():
        raise ArtifactError(f"model folder not found: {model_folder}")
    # `-P`: a file in the current folder must not shadow a module of the child.
    command = [sys.executable, "-P", "-c", "from foldgpt.evaluation.memory import main; main()"]
    command += [str(model_folder), "--dtype", dtype, "--device", device]
    command += ["--trust-remote-code"] if trust_remote_code else []
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode == -getattr(signal, "SIGKILL", 9):
        raise NotEnoughMemoryError(
            f"measuring the peak memory of {model_folder}: the process was killed, most likely because the "
            "machine ran out of memory."
        )
    if process.returncode != 0:
        lines = [line.strip() for line in process.stderr.rpartition("Traceback")[2].splitlines() if line.strip()]
        # Behind an error of CUDA come lines of advice.
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        reason = (named or lines or [f"exit status {process.returncode}"])[-1]
        is_full = any(words in line for line in lines for words in _OUT_OF_MEMORY)
        kind = NotEnoughMemoryError if is_full else MeasurementError
        raise kind(f"measuring the peak memory of {model_folder} failed: {reason}")
    return PeakMemory(**json.loads(process.stdout.splitlines()[-1]))


def _resident_bytes() -> int:
    """Resident bytes of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _forget_peak() -> None:
    """Start the count of the peak anew where the system allows it (Linux): imports leave one behind."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_bytes() -> int:
    """The most resident bytes of this process.

    Linux's `ru_maxrss` is of no use: a process started from a large one inherits its peak. `VmHWM` belongs to
    the address space, which is new.
    """
    system = platform.system()
    if system == "Windows":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if system == "Linux":
        high_water = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if high_water:
            return int(high_water[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if system == "Darwin" else peak * 1024


def _measure(model_folder: str, dtype: str, device: str, trust_remote_code: bool) -> PeakMemory:
    """Load and run the model in this process, which should be a fresh one."""
    import torch
    from transformers import AutoModelForCausalLM

    from foldgpt.evaluation.performance import prefill_and_decode, random_tokens, tokens_that_fit

    gc.collect()
    _forget_peak()
    baseline_rss = _resident_bytes()
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=dtype, local_files_only=True, trust_remote_code=trust_remote_code
    ).to(device)
    models = {"the model": model}
    prompt_tokens, decode_tokens = tokens_that_fit(models, _PROMPT_TOKENS, _DECODE_TOKENS)
    ids_BT = random_tokens(models, 1, prompt_tokens + decode_tokens, seed=0)
    prefill_and_decode(model, ids_BT, prompt_tokens)
    return PeakMemory(
        baseline_rss=baseline_rss,
        peak_rss=_peak_bytes(),
        peak_accelerator=torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None,
        device=device,
        dtype=dtype_name(model.dtype),
    )


def main() -> None:
    """Measure the model in the folder given on the command line and print the result as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()
    measured = _measure(arguments.folder, arguments.dtype, arguments.device, arguments.trust_remote_code)
    sys.stdout.write(json.dumps(asdict(measured)) + "\n")
