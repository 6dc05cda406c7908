"""llama.cpp on this machine: its converter, and its own predictions, by which a converted model is verified."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from foldgpt.errors import FoldGPTError, UsageError

_CONVERTER, _PERPLEXITY = "convert_hf_to_gguf.py", "llama-perplexity"
#: Where builds put programs, below the checkout.
_BUILT = ("build/bin", "bin", "build/bin/Release", ".")
_HOW = "https://github.com/ggml-org/llama.cpp"
#: Log-probabilities are stored in 16 bits behind two floats: the step between two of them, and the least one.
_HEAD = 4
#: What is this much below the largest logit, and all below it, is stored alike.
LEAST_LOGIT = 16.0


@dataclass(frozen=True)
class LlamaCpp:
    """A checkout of llama.cpp.

    Attributes:
        converter: its script that makes GGUF files of Hugging Face checkpoints.
        perplexity: its program that computes predictions of a text; None if it was not built.
    """

    converter: Path
    perplexity: Path | None

    @classmethod
    def at(cls, folder: str | Path) -> LlamaCpp:
        """The checkout in a folder, with its programs built there or found on the PATH.

        Raises:
            UsageError: there is no converter in it.
        """
        folder = Path(folder).resolve()
        converter = folder / _CONVERTER
        if not converter.is_file():
            raise UsageError(f"there is no {_CONVERTER} in {folder}: give the folder of a checkout of {_HOW}")
        places = os.pathsep.join(str(folder / place) for place in _BUILT)
        found = shutil.which(_PERPLEXITY, path=places) or shutil.which(_PERPLEXITY)
        return cls(converter, None if found is None else Path(found))

    def convert(self, checkpoint: Path, out: Path, outtype: str) -> None:
        """Make a GGUF file of a Hugging Face checkpoint.

        Args:
            checkpoint: its folder.
            out: the file to write.
            outtype: number format, as the converter names it.

        Raises:
            FoldGPTError: the converter refuses it.
        """
        _run(
            [sys.executable, str(self.converter), str(checkpoint), "--outfile", str(out), "--outtype", outtype],
            f"llama.cpp's converter refuses {checkpoint}",
        )
        if not out.is_file():
            raise FoldGPTError(f"llama.cpp's converter wrote no file for {checkpoint}")

    def predictions(self, model: Path, text: Path, context: int, work: Path) -> tuple[Tensor, Tensor]:
        """What llama.cpp predicts in the first window of a text, behind its first half.

        Args:
            model: a GGUF file.
            text: a UTF-8 file with two windows of tokens or more.
            context: tokens in a window, at least 4.
            work: a folder for what is needed on the way.

        Returns:
            The window's tokens, int64 [T], and log-probabilities at its positions T // 2 to T - 2, fp32 [R, V].

        Raises:
            FoldGPTError: llama.cpp cannot run the model, or wrote something that is not understood.
        """
        assert self.perplexity is not None
        out = work / "predictions.bin"
        asked = ["-m", model, "-f", text, "-c", context, "-b", context, "--chunks", 1, "--save-all-logits", out]
        _run([str(self.perplexity), *map(str, asked)], f"llama.cpp cannot run {model.name}")
        if not out.is_file():
            raise FoldGPTError(f"{self.perplexity} wrote no predictions of {model.name}")
        return _read_predictions(out, context)


def _run(command: Sequence[str], what: str) -> None:
    """Run a program that says what it does; only where it fails is that of interest."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise FoldGPTError(f"{what}: {command[0]} cannot be run ({error.strerror or error})") from error
    if done.returncode:
        if done.returncode < 0:
            raise FoldGPTError(f"{what}: it was killed by signal {-done.returncode}, as where memory runs out")
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise FoldGPTError(f"{what}: {lines[-1] if lines else f'exit code {done.returncode}'}")


def _read_predictions(path: Path, context: int) -> tuple[Tensor, Tensor]:
    """Read the file of `--save-all-logits`: "_logits_", three int32 (context, vocabulary, windows), tokens, rows."""
    content = path.read_bytes()
    head = numpy.frombuffer(content, "<i4", 3, 8) if len(content) >= 20 else numpy.zeros(3, "<i4")
    num_rows, width = context - 1 - context // 2, 2 * ((int(head[1]) + 1) // 2) + _HEAD
    needed = 20 + 4 * context + 2 * num_rows * width
    if not content.startswith(b"_logits_") or head[0] != context or head[2] != 1 or len(content) != needed:
        raise FoldGPTError("llama.cpp wrote predictions in a form that foldgpt does not know; is it another version?")
    tokens_T = numpy.frombuffer(content, "<i4", context, 20).astype("int64")
    stored = numpy.frombuffer(content, "<u2", num_rows * width, 20 + 4 * context).reshape(num_rows, width)
    scales_R2 = numpy.ascontiguousarray(stored[:, :_HEAD]).view("<f4")
    steps_RV = stored[:, _HEAD : _HEAD + int(head[1])].astype("float32")
    return torch.from_numpy(tokens_T), torch.from_numpy(scales_R2[:, :1] * steps_RV + scales_R2[:, 1:])
