"""Which of the causal language models that transformers knows can be folded.

A tiny random model of each is written to a folder, loaded, folded without two of its six blocks and with a pair that
shares weights and has private terms, saved, loaded again, compared and made to decode with a KV cache, as
`save_folded` does it. What foldgpt refuses is listed with its reason. Models that cannot be built small from the common
config below, or are larger than 20 M parameters then, are left out.

    python benchmarks/architectures.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from foldgpt.artifacts import write_json, write_text
from foldgpt.errors import FoldGPTError
from foldgpt.families import decoder_of
from foldgpt.folding import fold_, predicted_parameters, same_kind, save_folded, source_model_of
from foldgpt.plan import FoldPlan, Group
from foldgpt.progress import be_quiet, quiet_libraries
from provenance import measured_by, provenance_of

_REMOVED = (1, 4)
_MOST_PARAMETERS = 20e6
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
#: What a few need otherwise; None leaves a value out.
_OTHER: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 4},
    "falcon": {"head_dim": None},
    "glm4_moe_lite": {"num_key_value_heads": 4, "head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "num_layers": 6},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "nemotron_h": {"hybrid_override_pattern": "M-*-M*"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a model type; may be repeated (all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    rows = []
    for name in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING)):
        if arguments.only and name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append({"model_type": name, **tried(name, Path(folder))})
        print(rows[-1], flush=True)
    result = {**measured_by(), "rows": rows}
    write_json(arguments.out / "architectures.json", result)
    write_text(arguments.out / "architectures.md", as_markdown(result))


def tried(name: str, folder: Path) -> dict[str, Any]:
    """What becomes of one architecture."""
    try:
        with quiet_libraries():
            model = loaded(name, folder / "source")
    except Exception as error:  # of any config or model class
        return {"outcome": "not built", "why": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    if model is None:
        return {"outcome": "not built", "why": "too large"}
    try:
        decoder = decoder_of(model)
        kept = [index for index in range(len(decoder.blocks)) if index not in _REMOVED]
        pairs = ((i, j) for i in kept for j in kept if i < j and same_kind(decoder, i, j, ("attention", "mlp")))
        private = ("norms", "scales") if decoder.sublayers is not None else ("norms",)
        pair = next(pairs, None)
        groups = [] if pair is None else [Group(blocks=pair, private=private, ranks=2)]
        plan = FoldPlan.create(source_model_of(model), removed=_REMOVED, groups=groups)
        expected = predicted_parameters(model, plan)
        fold_(model, plan)
        save_folded(model, plan, folder / "folded", expected_parameters=expected)
    except FoldGPTError as error:
        return {"outcome": "refused", "why": str(error)}
    return {"outcome": "folded", "sublayers": decoder.sublayers is not None, "shared": pair is not None}


@torch.no_grad()
def loaded(name: str, folder: Path) -> Any:
    """A tiny random model as it comes from its files; None if it is not tiny."""
    values = {key: value for key, value in {**_COMMON, **_OTHER.get(name, {})}.items() if value is not None}
    config = AutoConfig.for_model(name, **values)
    with torch.device("meta"):
        if AutoModelForCausalLM.from_config(config).num_parameters() > _MOST_PARAMETERS:
            return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model(torch.tensor([[3, 4, 5]]), use_cache=False)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def as_markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    folded = [row for row in rows if row["outcome"] == "folded"]
    known = ", ".join(f"`{row['model_type']}`" for row in folded if row["sublayers"])
    others = ", ".join(f"`{row['model_type']}`" for row in folded if not row["sublayers"])
    refused = "\n".join(f"| `{row['model_type']}` | {row['why']} |" for row in rows if row["outcome"] == "refused")
    left_out = ", ".join(f"`{row['model_type']}`" for row in rows if row["outcome"] == "not built")
    return f"""# Architectures

{len(folded)} model types fold. With known sublayers: {known}. Whole blocks only: {others}.

| refused | why |
|---|---|
{refused}

Not built small from the common config, so not tried: {left_out}.

{provenance_of(result)}
"""


if __name__ == "__main__":
    main()
