"""Which flag of a verb sets which key of a recipe, so that its errors speak of what was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: Keys of all verbs that take a model.
_MODEL = {
    name: f"--{name.replace('_', '-')}"
    for name in ("revision", "dtype", "device", "seed", "max_memory_gb", "trust_remote_code")
}
_CALIBRATION = {
    "calibration.texts": "--text",
    "calibration.context": "--context",
    "calibration.num_tokens": "--tokens",
}
_CUT = {
    "select.method": "--select",
    "select.remove": "--remove",
    "select.remove_ratio": "--remove-ratio",
    "select.target": "--target",
    "select.num_tokens": "--search-tokens",
    "select.copies": "--copies",
    "select.objective": "--objective",
    "select.sublayers": "--sublayers",
    "select.options": "--option",
    "compensate.method": "--compensate",
    "share.method": "--share",
    **{
        f"share.{name}": f"--{name.replace('_', '-')}"
        for name in ("size", "group_size", "donor", "fit", "rank", "scales", "start")
    },
}

ANALYZE = {**_MODEL, **_CALIBRATION}
PLAN = {**ANALYZE, **_CUT}
_SAVED = {"save_dtype": "--save-dtype"}
FOLD = {**{key: flag for key, flag in _MODEL.items() if key != "seed"}, **_SAVED}
RECOVER = {
    **_MODEL,
    **_SAVED,
    "recover.num_tokens": "--tokens",
    "recover.texts": "--text",
    "recover.settings": "--set",
    **{
        f"recover.{name}": f"--{name.replace('_', '-')}"
        for name in ("context", "held_out_tokens", "separate_documents", "minutes", "teacher_cache", "report_to")
    },
}
EVAL = {
    **_MODEL,
    "evaluate.texts": "--perplexity",
    **{
        f"evaluate.{name}": f"--{name.replace('_', '-')}"
        for name in ("context", "stride", "max_windows", "tasks", "data_dir", "limit", "generations")
    },
}
RUN = {
    **PLAN,
    **_SAVED,
    "model": "--model",
    "recover.num_tokens": "--recover-tokens",
    "recover.texts": "--recover-text",
    "recover.minutes": "--recover-minutes",
    "recover.settings": "--recover-set",
    "evaluate.texts": "--perplexity",
}
COMPARE = {
    **_MODEL,
    **_SAVED,
    "model": "--model",
    "recover.num_tokens": "--recover-tokens",
    **{key: _CUT[key] for key in ("select.remove", "select.remove_ratio", "select.target")},
}

#: What a recipe made of flags alone is called in errors.
OPTIONS = "options"


def in_flags(message: str, flags: Mapping[str, str], *, beside_keys: bool = False) -> str:
    """An error about a recipe in the words of a verb's flags.

    Args:
        message: what the error says; keys of sections stand in it as `section.key`, others at the start of a problem.
        flags: key → flag.
        beside_keys: keep the keys, where a recipe may be meant as well, and add the flags.
    """
    message = message.removeprefix(f"{OPTIONS}: ")
    longest_first = sorted(flags, key=len, reverse=True)
    dotted = "|".join(re.escape(key) for key in longest_first if "." in key)
    plain = "|".join(re.escape(key) for key in longest_first if "." not in key)

    def flag(match: re.Match[str]) -> str:
        return f"{match[0]} ({flags[match[0]]})" if beside_keys else flags[match[0]]

    if dotted:
        message = re.sub(rf"(?<![\w.-])(?:{dotted})(?![\w.])", flag, message)
    return re.sub(rf"(?:(?<=^)|(?<=; ))(?:{plain})(?=: )", flag, message)
