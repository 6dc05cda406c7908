"""Peak memory of the analysis of a model larger than the memory it may use.

Makes a random bfloat16 checkpoint in the shape of Llama 2 7B, shard by shard, then analyses it in a child
process and reports the child's peak resident set, which counts mapped file pages too. `--weights-gb` is
what `load_source` may keep in memory; the rest of the limit is for the libraries (about 0.4 GB), the stored
states (at most 1 GB), activations and the block that runs. `--num-blocks`, `--hidden` and `--intermediate`
make a smaller model for a quick look.

    python benchmarks/analyze_7b_shaped.py --work-dir /var/tmp/7b --limit-gb 6 --weights-gb 3
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from foldgpt.artifacts import write_json, write_text
from foldgpt.environment import describe_environment
from provenance import provenance_of

SHARD_BYTES = 512 * 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="where the checkpoint goes; 14 GB for the full shape"
    )
    parser.add_argument("--limit-gb", type=float, default=6.0, help="peak RSS that counts as success")
    parser.add_argument("--weights-gb", type=float, default=3.0, help="max_memory_gb of load_source")
    parser.add_argument("--num-blocks", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of random token ids")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint, and use one that is already there")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def parameter_shapes(arguments: argparse.Namespace) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama model's parameters, in order of depth."""
    hidden, intermediate, vocabulary = arguments.hidden, arguments.intermediate, arguments.vocabulary
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(arguments.num_blocks):
        prefix = f"model.layers.{block}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{prefix}.mlp.{name}.weight", (intermediate, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def make_checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    """Write the checkpoint, holding one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(arguments.seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0

    def write_shard() -> None:
        nonlocal shard, shard_bytes
        file_name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
        shard, shard_bytes = {}, 0

    for name, shape in parameter_shapes(arguments):
        if len(shape) == 1:
            weight = torch.ones(shape, dtype=torch.bfloat16)
        else:
            weight = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if shard and shard_bytes + weight.nbytes > SHARD_BYTES:
            write_shard()
        shard[name] = weight
        shard_bytes += weight.nbytes
        total_bytes += weight.nbytes
    write_shard()
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "hidden_size": arguments.hidden,
            "intermediate_size": arguments.intermediate,
            "num_hidden_layers": arguments.num_blocks,
            "num_attention_heads": arguments.heads,
            "num_key_value_heads": arguments.heads,
            "vocab_size": arguments.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
    )
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows bytes only: the calibration ids are random, but a source must have one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def peak_rss_bytes() -> int:
    """Peak resident set of this process, mapped file pages included.

    Linux starts a child's `ru_maxrss` at its parent's, so the kernel's own high-water mark is read there.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def analyse_child(folder: Path, arguments: argparse.Namespace) -> None:
    """Runs in the child: load within the budget, analyse, print what was seen as one line of JSON."""
    from foldgpt.analysis import analyze
    from foldgpt.progress import be_quiet
    from foldgpt.sources import load_source

    be_quiet()
    imported = peak_rss_bytes()
    started = time.perf_counter()
    source = load_source(str(folder), dtype="bfloat16", device="cpu", max_memory_gb=arguments.weights_gb)
    load_seconds, loaded = time.perf_counter() - started, peak_rss_bytes()
    generator = torch.Generator().manual_seed(arguments.seed)
    ids = torch.randint(arguments.vocabulary, (arguments.windows, arguments.context), generator=generator)
    analysis = analyze(source.model, ids)
    print(
        json.dumps(
            {
                "peak_rss_bytes": peak_rss_bytes(),
                "peak_rss_bytes_after_import": imported,
                "peak_rss_bytes_after_load": loaded,
                "load_seconds": round(load_seconds, 2),
                "sweep_seconds": analysis.seconds,
                "num_tokens": analysis.num_tokens,
                "bi": analysis.bi,
            }
        )
    )


def main() -> None:
    arguments = parse_arguments()
    folder = arguments.work_dir / "checkpoint"
    if arguments.child:
        analyse_child(folder, arguments)
        return
    try:
        if not (arguments.keep and (folder / "config.json").is_file()):
            make_checkpoint(folder, arguments)
        checkpoint_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        command = [sys.executable, *sys.argv, "--child"]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)
    measured = json.loads(child.stdout.splitlines()[-1])
    result = {
        "benchmark": "analyze_7b_shaped",
        "command": ["python", *sys.argv],
        "config": {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("child", "keep", "out", "seed", "work_dir")
        },
        "seed": arguments.seed,
        "environment": describe_environment(),
        "checkpoint_bytes": checkpoint_bytes,
        "within_limit": measured["peak_rss_bytes"] <= arguments.limit_gb * 1e9,
        **measured,
    }
    write_json(arguments.out / "analyze_7b_shaped.json", result)
    write_text(arguments.out / "analyze_7b_shaped.md", as_markdown(result))
    print(as_markdown(result))


def as_markdown(result: dict) -> str:
    config = result["config"]
    verdict = f"{'within' if result['within_limit'] else 'OVER'} the limit of {config['limit_gb']:.2f} GB"
    return f"""# Analysis of a model larger than memory

Random bfloat16 weights in the shape of Llama: {config["num_blocks"]} blocks, hidden {config["hidden"]},
intermediate {config["intermediate"]}, vocabulary {config["vocabulary"]}.

| | |
|---|---|
| checkpoint | {result["checkpoint_bytes"] / 1e9:.2f} GB |
| of it allowed in memory | {config["weights_gb"]:.2f} GB |
| **peak RSS of the process** | **{result["peak_rss_bytes"] / 1e9:.2f} GB** ({verdict}) |
| peak RSS after importing / after loading | {result["peak_rss_bytes_after_import"] / 1e9:.2f} GB / \
{result["peak_rss_bytes_after_load"] / 1e9:.2f} GB |
| tokens | {result["num_tokens"]} ({config["windows"]} windows of {config["context"]}, random ids) |
| load | {result["load_seconds"]:.1f} s |
| sweep | {result["sweep_seconds"]:.1f} s |

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()
