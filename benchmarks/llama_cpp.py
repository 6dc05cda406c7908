"""Folded models in llama.cpp: size, perplexity and speed beside the source, in 16 bits and quantised.

Each model is exported as `foldgpt export --to gguf` does it, verified, and quantised by llama.cpp's own program. The
source is converted as it is, and so is, for comparison, a folded model to whose file the export adds the pattern of
attention. Perplexity is llama.cpp's, which scores the second half of each window; speeds are of llama-bench, whose runs
take turns, as a ratio to the source in the same format: median over rounds.

    python benchmarks/llama_cpp.py --llama-cpp ~/llama.cpp --source demo:smollm2-135m --folded runs/demo \
        --text wiki.test.raw --chunks 40
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from command import command_line
from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from foldgpt.export import export_gguf
from foldgpt.export.llama_cpp import LlamaCpp
from foldgpt.progress import be_quiet
from foldgpt.run_folder import final_model
from foldgpt.sources import resolve
from provenance import provenance_of

_PREFILL, _DECODE = "prefill", "decode"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="a checkout with its programs built")
    parser.add_argument("--source", required=True, help="a checkpoint in Hugging Face's format, or demo:NAME")
    parser.add_argument("--folded", type=Path, action="append", required=True, help="a folded model; may be repeated")
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure perplexity on")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window of perplexity")
    parser.add_argument("--chunks", type=int, default=40, help="windows")
    parser.add_argument("--outtype", default="bf16", help="format of the export")
    parser.add_argument("--quantised", action="append", help="formats of llama-quantize; may be repeated (Q4_K_M)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="of speed, in turns; 0 for none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="llama_cpp", help="stem of the result files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.quantised = arguments.quantised or ["Q4_K_M"]
    return arguments


def main() -> None:
    arguments = parse_arguments()
    be_quiet()
    tools = LlamaCpp.at(arguments.llama_cpp)
    if tools.perplexity is None:
        raise SystemExit("llama-perplexity is not built")
    programs = tools.perplexity.parent
    with tempfile.TemporaryDirectory() as name:
        work, rows = Path(name), []
        files = [work / "source.gguf"]
        tools.convert(resolve(arguments.source), files[0], arguments.outtype)
        verified = {"source": None}
        for folder in map(final_model, arguments.folded):
            blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
            file = work / f"{folder.parent.name if folder.name in ('folded', 'recovered') else folder.name}.gguf"
            found = export_gguf(folder, file, arguments.llama_cpp, outtype=arguments.outtype)
            verified[file.stem] = {"blocks": blocks, "divergence": found.divergence, "pattern": found.pattern}
            files.append(file)
            if found.pattern:
                # As whoever does not know of it would make it.
                files.append(work / f"{file.stem} without it.gguf")
                tools.convert(folder, files[-1], arguments.outtype)
        for outtype in [arguments.outtype, *arguments.quantised]:
            made = []
            for file in files:
                target = file if outtype == arguments.outtype else file.with_name(f"{file.stem}-{outtype}.gguf")
                if target != file:
                    _said([programs / "llama-quantize", file, target, outtype])
                made.append(target)
            speeds = _speeds(programs / "llama-bench", made, arguments)
            for file, target, speed in zip(files, made, speeds, strict=True):
                row = {
                    "model": file.stem,
                    "format": outtype,
                    "bytes": target.stat().st_size,
                    "perplexity": _perplexity(tools.perplexity, target, arguments),
                    **{what: statistics.median(ratios) if ratios else None for what, ratios in speed.items()},
                }
                rows.append(row)
                print(row, flush=True)
    version = _said([programs / "llama-bench", "--version"], check=False)
    result = {
        "benchmark": "llama_cpp",
        "command": command_line(),
        "environment": describe_environment(),
        "llama_cpp": next(iter(re.findall(r"version: (.*)", version)), "unknown"),
        "config": {
            "text": arguments.text.name,
            **{name: getattr(arguments, name) for name in ("source", "context", "chunks", "threads", "rounds")},
            "prompt_tokens": arguments.prompt_tokens,
            "decode_tokens": arguments.decode_tokens,
        },
        "verified": verified,
        "rows": rows,
    }
    place = arguments.out / f"{arguments.name}.json"
    write_json(place, result)
    write_text(place.with_suffix(".md"), as_markdown(result))
    print(place.with_suffix(".md").read_text())


def _said(command: list[Any], *, check: bool = True) -> str:
    """What a program prints."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=check)
    return done.stdout + done.stderr


def _perplexity(program: Path, model: Path, arguments: argparse.Namespace) -> float:
    asked = ["-m", model, "-f", arguments.text, "-c", arguments.context, "-b", arguments.context]
    said = _said([program, *asked, "--chunks", arguments.chunks, "-t", arguments.threads])
    return float(re.findall(r"Final estimate: PPL = ([\d.]+)", said)[0])


def _speeds(program: Path, models: list[Path], arguments: argparse.Namespace) -> list[dict[str, list[float]]]:
    """Ratios to the first model, round by round."""
    speeds: list[dict[str, list[float]]] = [{_PREFILL: [], _DECODE: []} for _ in models]
    for _ in range(arguments.rounds):
        seen = []
        for model in models:
            asked = ["-m", model, "-p", arguments.prompt_tokens, "-n", arguments.decode_tokens, "-r", 1]
            said = _said([program, *asked, "-t", arguments.threads, "-o", "json"])
            runs = json.loads(said[said.index("[") : said.rindex("]") + 1])
            seen.append({_PREFILL if run["n_gen"] == 0 else _DECODE: run["avg_ts"] for run in runs})
        for ratios, own in zip(speeds, seen, strict=True):
            for what, speed in own.items():
                ratios[what].append(speed / seen[0][what])
    return speeds


def _times(ratio: float | None) -> str:
    return "—" if ratio is None else f"{ratio:.2f}×"


def as_markdown(result: dict[str, Any]) -> str:
    config, verified = result["config"], result["verified"]
    checked = "; ".join(
        f"{name} ({found['blocks']} blocks) {found['divergence']:.1e}"
        + (" with its pattern of attention added" if found["pattern"] else "")
        for name, found in verified.items()
        if found
    )
    lines = [
        f"| {row['model']} | {row['format']} | {row['bytes'] / 1e6:.1f} MB | {row['perplexity']:.2f} "
        f"| {_times(row[_PREFILL])} | {_times(row[_DECODE])} |"
        for row in result["rows"]
    ]
    table = "\n".join(lines)
    return f"""# Folded models in llama.cpp

Perplexity of {config["text"]} as llama-perplexity measures it: {config["chunks"]} windows of {config["context"]}
tokens, of which the second half counts. Prefill of {config["prompt_tokens"]} tokens and decoding of
{config["decode_tokens"]}, tokens/s over those of the source in the same format, {config["threads"]} threads, median of
{config["rounds"]} rounds in turns. KL divergence of llama.cpp's predictions from the model's, in nats per token, as the
export verifies it: {checked}. llama.cpp {result["llama_cpp"]}.

| model | format | size | perplexity | prefill | decode |
|---|---|---|---|---|---|
{table}

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()
