"""Text that a model writes itself, for people without data: sampled as far as it is read, and kept on disk.

A model's own samples come from the distribution that it was trained on, or nearly, and from nothing else, which is
what calibration and distillation ask for (the idea is LLM-QAT's, Liu et al. 2023, arXiv 2305.17888).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch
from filelock import FileLock
from transformers import GenerationConfig, PreTrainedTokenizerBase

from foldgpt.artifacts import hash_of, write_text
from foldgpt.attention import fast_attention
from foldgpt.cache import cache_folder
from foldgpt.errors import SourceError, UsageError, did_you_mean
from foldgpt.families import num_positions
from foldgpt.progress import bar, quiet_libraries

SELF = "self:"

#: Documents that are sampled at once; a file holds as many.
_BATCH = 32
#: Raise it when the code that samples changes, so that old files are not used.
_VERSION = 3


@dataclass(frozen=True)
class Sampling:
    """How a model's own text is sampled.

    Attributes:
        seed: seed of what is drawn; another seed gives other documents.
        temperature: what logits are divided by.
        top_p: draw from the likeliest tokens that have this probability together.
        length: tokens after which a document that has not ended is cut.

    Raises:
        UsageError: a value that makes no sense.
    """

    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    length: int = 512

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be more than 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be more than 0 and at most 1, not {self.top_p}")
        if self.length < 1:
            raise UsageError(f"the length must be at least 1, not {self.length}")

    @classmethod
    def parse(cls, spec: str) -> Sampling:
        """Read `self:` or `self:?seed=…&temperature=…&top_p=…&length=…`.

        Raises:
            UsageError: it is neither.
        """
        rest = spec.removeprefix(SELF)
        if rest and not rest.startswith("?"):
            raise UsageError(f"{spec!r}: behind {SELF} stand options alone, such as {SELF}?temperature=0.8")
        kinds: dict[str, type] = {field.name: type(field.default) for field in fields(cls)}
        given: dict[str, Any] = {}
        for name, value in parse_qsl(rest[1:], keep_blank_values=True):
            if name not in kinds:
                raise UsageError(f"unknown option {name!r} in {spec}.{did_you_mean(name, kinds)}")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                raise UsageError(f"{spec}: {name} must be a number, not {value!r}") from None
        return cls(**given)


class OwnText:
    """The text of one model.

    Documents begin as the model's documents do: behind BOS, or behind EOS where there is no BOS. They end with EOS or
    after a number of tokens. Files of 32 documents are kept in the cache, by model and sampling, each sampled from a
    seed of its own; so what was sampled once is only read, a killed process loses one file at most, and how much is
    read does not change what is there. The numbers of one machine may differ from those of another in the last bit,
    and then so do the samples.

    Args:
        model: gives the model when it is needed, in eval mode.
        tokenizer: its tokenizer.
        fingerprint: identity of its weights.
        folder: where the files are kept; by default in the user's cache.
    """

    def __init__(
        self,
        model: Callable[[], Any],
        tokenizer: PreTrainedTokenizerBase,
        fingerprint: str,
        folder: Path | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._fingerprint = fingerprint
        self._folder = folder

    def identity(self, sampling: Sampling) -> str:
        """What tells this text from others."""
        return hash_of({"model": self._fingerprint, "sampling": asdict(sampling), "version": _VERSION})

    def documents(self, sampling: Sampling) -> Iterator[str]:
        """Documents without end; empty ones are left out.

        Raises:
            SourceError: the tokenizer has neither BOS nor EOS, the model writes nothing, or the cache cannot be
                written.
            UsageError: the documents are longer than the model has positions.
        """
        folder = (self._folder or cache_folder() / "own-text") / self.identity(sampling)[:32]
        shard = 0
        while True:
            yield from self._shard(folder / f"{shard:06}.jsonl", shard, sampling)
            shard += 1

    def _shard(self, path: Path, shard: int, sampling: Sampling) -> list[str]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / ".lock"):
                if not path.is_file():
                    found = self._sample(shard, sampling)
                    write_text(path, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found))
        except OSError as error:
            raise SourceError(f"cannot write {path}: {error.strerror or error}") from error
        # Not `splitlines`: it also breaks at U+2028 and others, which JSON leaves in strings as they are.
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]

    @torch.no_grad()
    def _sample(self, shard: int, sampling: Sampling) -> list[str]:
        tokenizer: Any = self._tokenizer
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise SourceError("the tokenizer has neither BOS nor EOS, so the model's own text has no beginning")
        model = self._model()
        positions = num_positions(model.config)
        if positions is not None and sampling.length > positions:
            raise UsageError(
                f"{SELF} is to write documents of {sampling.length} tokens, but the model has {positions} positions; "
                f"{SELF}?length={positions} is the longest"
            )
        ends = _ends(model, tokenizer)
        device = model.get_input_embeddings().weight.device
        start_BT = torch.full((_BATCH, 1), start, device=device)
        config = GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            num_beams=1,
            repetition_penalty=1.0,
            max_new_tokens=sampling.length,
            eos_token_id=ends or None,
            pad_token_id=start,
        )
        devices = [device] if device.type == "cuda" else []
        with (
            bar(f"the model writes documents {shard * _BATCH + 1}-{(shard + 1) * _BATCH}", sampling.length) as progress,
            torch.random.fork_rng(devices),
            quiet_libraries(),
            fast_attention(model),
            _without_own_wishes(model),
        ):
            torch.manual_seed(int(hash_of([sampling.seed, shard])[:12], 16))
            written_BT = model.generate(
                input_ids=start_BT,
                attention_mask=torch.ones_like(start_BT),
                generation_config=config,
                streamer=_Progress(progress.advance),
            )
        texts = [self._text(row[1:], ends) for row in written_BT.tolist()]
        if not any(texts):
            raise SourceError(f"behind {tokenizer.convert_ids_to_tokens(start)} the model writes nothing")
        return [text for text in texts if text]

    def _text(self, ids: list[int], ends: list[int]) -> str:
        length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text: str = self._tokenizer.decode(ids[:length], skip_special_tokens=True)
        return text if text.strip() else ""


@contextmanager
def _without_own_wishes(model: Any) -> Iterator[None]:
    """Leave the model's own generation config out: it would fill in all that is not asked for, meant for chats."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class _Progress:
    """One step of the bar for each token: `generate` hands all new tokens of the batch to a streamer."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def put(self, _: Any) -> None:
        self._advance()

    def end(self) -> None: ...


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a document: the tokenizer's EOS and what the model's own config adds (Llama 3, Gemma)."""
    more = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = more if isinstance(more, list) else [more]
    return sorted({token for token in (tokenizer.eos_token_id, *listed) if token is not None})
