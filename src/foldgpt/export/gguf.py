"""The folded model as a GGUF file for llama.cpp, and for all that is built on it.

llama.cpp's own converter makes the file. What is left to do here is what removal changes and a converter does not
expect: architectures whose blocks attend in several ways repeat a pattern that some converters leave to the program
that reads the file, and blocks that were removed leave another pattern. So it is written into the file, and the
predictions that llama.cpp makes with it are held against the model's own before the file appears.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from torch import Tensor

from foldgpt.artifacts import alone, check_free_file, no_empty_folders_above, read_json, workspace_beside
from foldgpt.errors import ArtifactError, FoldGPTError, UsageError, VerificationError, did_you_mean
from foldgpt.export.dense import export_dense, folded_plan
from foldgpt.export.llama_cpp import LEAST_LOGIT, LlamaCpp
from foldgpt.families import input_device, num_positions
from foldgpt.progress import note, quiet_libraries
from foldgpt.sources import load_source

#: Number formats that llama.cpp's converter writes; "auto" are the 16 bits that it finds nearest to the checkpoint.
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")
#: KL divergence of llama.cpp's predictions from the model's, in nats per token, that is taken for rounding. Seen were
#: 1e-4 in bf16 (6e-3 of a model that sharing had all but destroyed) and 5e-3 in q8_0; and 0.3 of Gemma 3 without four
#: blocks whose pattern was not told.
_TOLERANCE, _TOLERANCE_8_BITS = 0.02, 0.05
#: Tokens in the window that is compared, at most: sliding windows of small models are shorter.
_CONTEXT = 1024
#: Positions that are compared at once.
_ROWS = 32
#: Kinds of attention that a GGUF file marks as sliding.
_SLIDING = ("sliding_attention", "chunked_attention")
#: Text that is there wherever foldgpt is; which one it is does not matter.
_MODULES = ("foldgpt.plan", "foldgpt.pipeline", "foldgpt.recipe", "foldgpt.side_by_side", "foldgpt.workbench")


@dataclass(frozen=True)
class ExportedGGUF:
    """What was written, and how it was verified.

    Attributes:
        num_bytes: of the file.
        pattern: which positions attend in a sliding window, where that had to be added to the file; else None.
        divergence: mean KL(model ‖ llama.cpp) in nats per token; None where it was not verified.
        same_tokens: whether both tokenize the text that it was measured on alike; None where it was not.
    """

    num_bytes: int
    pattern: tuple[bool, ...] | None
    divergence: float | None
    same_tokens: bool | None


def export_gguf(
    folder: str | Path,
    out: str | Path,
    llama_cpp: str | Path,
    *,
    outtype: str = "auto",
    verify: bool = True,
    device: str = "auto",
    max_memory_gb: float | None = None,
    trust_remote_code: bool = False,
    replace: bool = False,
) -> ExportedGGUF:
    """Make a GGUF file of a folded model.

    Args:
        folder: a folded or a recovered model; what is shared is copied first, as `export_dense` does.
        out: the file.
        llama_cpp: a checkout of llama.cpp, with `llama-perplexity` built in it or on the PATH.
        outtype: one of `OUTTYPES`.
        verify: compare the predictions that llama.cpp makes with the model's own; False does without.
        device: where the model's own predictions are made; see `load_source`, as for the next two.
        max_memory_gb: memory that the weights may take.
        trust_remote_code: run modelling code that comes with the model.
        replace: replace an existing file.

    Raises:
        UsageError: no folded model, no llama.cpp, a program of it that was not built, or an unknown `outtype`.
        UnsupportedModelError: blocks lack an attention or an MLP.
        FoldGPTError: llama.cpp refuses the model, or it does not fit in memory.
        ArtifactError: `out` is taken, lies in `folder`, cannot be written, or another process is about to write it.
        VerificationError: llama.cpp computes something else; no file is left.
    """
    folder, out = Path(folder), Path(out)
    loading: dict[str, Any] = {"device": device, "max_memory_gb": max_memory_gb, "trust_remote_code": trust_remote_code}
    if outtype not in OUTTYPES:
        raise UsageError(f"unknown outtype {outtype!r}.{did_you_mean(outtype, OUTTYPES)}")
    check_free_file(out, replace=replace)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{out} lies inside the model {folder}, which is read. Choose another place.")
    folded_plan(folder)
    tools = LlamaCpp.at(llama_cpp)
    if verify and tools.perplexity is None:
        raise UsageError(
            f"llama-perplexity is neither in {llama_cpp} nor on the PATH, and what llama.cpp computes is verified by "
            "it: build it (cmake -B build && cmake --build build --target llama-perplexity), or do without "
            "(--unverified, verify=False)"
        )
    with no_empty_folders_above(out), alone(out, wait=False), workspace_beside(out) as work:
        # Another process may have ended between the two.
        check_free_file(out, replace=replace)
        checkpoint = folder
        if "fold_layout" in read_json(folder / "config.json", "config"):
            note("copying what is shared")
            checkpoint = work / "dense"
            export_dense(folder, checkpoint, **loading)
        note("converting")
        file = work / "model.gguf"
        tools.convert(checkpoint, file, outtype)
        pattern = _with_pattern(file, read_json(checkpoint / "config.json", "config"))
        divergence = same_tokens = None
        if verify:
            note("verifying what llama.cpp predicts")
            divergence, same_tokens = _verified(tools, file, checkpoint, work, outtype, loading)
        num_bytes = file.stat().st_size
        file.replace(out)
    return ExportedGGUF(num_bytes, pattern, divergence, same_tokens)


def _with_pattern(file: Path, config: dict[str, Any]) -> tuple[bool, ...] | None:
    """Say in the file which blocks attend in a sliding window, if the converter did not.

    Args:
        file: the GGUF file; replaced.
        config: of the checkpoint.

    Returns:
        One flag a position, if they were added.
    """
    text_config = config.get("text_config") or config
    pattern = tuple(kind in _SLIDING for kind in text_config.get("layer_types") or ())
    # Of one kind alone it is told as well: removal may have left no others, and the program would count all the same.
    if not pattern or not (any(pattern) or text_config.get("sliding_window")):
        return None
    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError) as error:
        raise FoldGPTError(f"llama.cpp's converter wrote a file that cannot be read: {error}") from error
    key = f"{architecture}.attention.sliding_window_pattern"
    field = reader.fields.get(key)
    if field is not None and field.contents() == list(pattern):
        return None
    added = {key: MetadataDetails(GGUFValueType.ARRAY, list(pattern), sub_type=GGUFValueType.BOOL)}
    whole = file.with_name(f"{file.name}.with-pattern")
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar of its own
        writer = GGUFWriter(whole, arch=architecture, endianess=reader.endianess)
        copy_with_new_metadata(reader, writer, added, [])
    whole.replace(file)
    return pattern


def _verified(
    tools: LlamaCpp, file: Path, checkpoint: Path, work: Path, outtype: str, loading: dict[str, Any]
) -> tuple[float, bool]:
    """Compare llama.cpp's predictions with the model's, on llama.cpp's own tokens."""
    source = load_source(checkpoint, dtype="float32", **loading)
    context = min(_CONTEXT, num_positions(source.model.config) or _CONTEXT)
    text = work / "text.txt"
    text.write_text("\n".join(_text_of(name) for name in _MODULES), encoding="utf-8")
    tokens_T, theirs_RV = tools.predictions(file, text, context, work)
    with quiet_libraries():  # it warns of a text longer than the model's positions
        own_ids = source.tokenizer(text.read_text(encoding="utf-8"))["input_ids"][:context]
    same_tokens = own_ids == tokens_T.tolist()
    metadata = GGUFReader(file).fields
    adds_bos, bos = (metadata.get(f"tokenizer.ggml.{name}") for name in ("add_bos_token", "bos_token_id"))
    if adds_bos is not None and adds_bos.contents() and bos is not None:
        # Each window begins with it, in place of what stood there.
        tokens_T[0] = int(bos.contents())
    with torch.no_grad():
        ids_1T = tokens_T[None].to(input_device(source.model))
        logits_RV = source.model(ids_1T).logits[0, context // 2 : -1].float().cpu()
    divergence = _divergence(logits_RV, theirs_RV)
    tolerance = _TOLERANCE_8_BITS if outtype == "q8_0" else _TOLERANCE
    if not divergence <= tolerance:
        raise VerificationError(
            f"llama.cpp computes something else than the model: a KL divergence of {divergence:.3f} nats per token "
            f"(tolerance {tolerance}). It may take something from a block's number, which removal has changed. Nothing "
            "was written."
        )
    return divergence, same_tokens


def _divergence(logits_RV: Tensor, theirs_RV: Tensor) -> float:
    """Mean KL divergence of predictions that were stored by llama.cpp from a model's own, in nats per token.

    Args:
        logits_RV: of the model, fp32 [R, V].
        theirs_RV: log-probabilities, fp32 [R, V]. A converter may leave out rows of the head that stand for no token.
    """
    num_tokens, total = min(logits_RV.shape[1], theirs_RV.shape[1]), 0.0
    # Of a large vocabulary all rows at once in fp64 take gigabytes.
    for own_RV, stored_RV in zip(logits_RV.split(_ROWS), theirs_RV.split(_ROWS), strict=True):
        own_RV, stored_RV = own_RV[:, :num_tokens].double(), stored_RV[:, :num_tokens].double()
        # Nothing less likely than this is stored; of large vocabularies that is as much as rounding.
        own_RV = own_RV.maximum(own_RV.amax(-1, keepdim=True) - LEAST_LOGIT).log_softmax(-1)
        total += float((own_RV.exp() * (own_RV - stored_RV.log_softmax(-1))).sum())
    return total / len(logits_RV)


def _text_of(module: str) -> str:
    path = importlib.import_module(module).__file__
    assert path is not None
    return Path(path).read_text(encoding="utf-8")
