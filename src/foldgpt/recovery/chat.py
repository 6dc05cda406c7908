"""Chats as training windows: the loss is on what the assistant says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from foldgpt.errors import UsageError
from foldgpt.recovery.windows import TrainingWindows

Message = dict[str, Any]


def chat_windows(
    chats: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, *, context: int, num_windows: int
) -> TrainingWindows:
    """One chat a window, cut or filled up to the context; only the assistant's tokens are scored.

    Many chat templates do not mark what the assistant says. So the spans are found by comparison: a reply is what the
    rendered chat has more with it than without it, behind the template's own opening of an assistant turn.

    Args:
        chats: lists of `{"role": …, "content": …}`.
        tokenizer: the model's tokenizer, with a chat template.
        context: tokens in a window.
        num_windows: how many chats to take.

    Raises:
        UsageError: there is no template, it cannot render a chat or renders it differently once another turn follows,
            there are too few chats, or no token in them is the assistant's.
    """
    if not tokenizer.chat_template:
        raise UsageError("the tokenizer has no chat template, so chats cannot be rendered")
    filler = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids_WT = torch.full((num_windows, context), int(filler or 0), dtype=torch.int32)
    scored_WT = torch.zeros(num_windows, context, dtype=torch.bool)
    count = 0
    for chat in chats:
        if count == num_windows:
            break
        try:
            tokens, spans = _rendered(chat, tokenizer)
        except (TemplateError, ValueError, TypeError, NotImplementedError) as error:  # a template raises what it likes
            raise UsageError(f"chat {count + 1} cannot be rendered: {error}") from error
        ids_WT[count, : len(tokens)] = torch.tensor(tokens[:context], dtype=torch.int32)
        for start, stop in spans:
            scored_WT[count, start:stop] = True
        count += 1
    if count < num_windows:
        raise UsageError(f"there are {count} chats, and {num_windows} are asked for")
    if not bool(scored_WT[:, 1:].any()):
        raise UsageError("no token of these chats is the assistant's, within the context; nothing would be trained on")
    return TrainingWindows(ids_WT, scored_WT)


def _end_of_earlier_reply(whole: str, opening: str, closed: str, content: Any) -> int | None:
    """Where a reply ends that is rendered with more before it while it is the last one; None if that cannot be told.

    Qwen 3's template puts empty reasoning before the last reply, and leaves it out once another turn follows.

    Args:
        whole: the chat as it is rendered.
        opening: what comes before the reply.
        closed: the chat up to the reply, which is the last one there.
        content: what the reply says.
    """
    if not isinstance(content, str) or not content or not (whole.startswith(opening) and closed.startswith(opening)):
        return None
    said, marker, closing = closed[len(opening) :].rpartition(content)
    # Whatever else is rendered there belongs to the template: what is said is said once.
    if not marker or content in said:
        return None
    stop = len(opening) + len(content + closing)
    return stop if whole[len(opening) : stop] == content + closing else None


def _rendered(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a chat, and from where to where each reply runs in them."""
    for message in chat:
        if not isinstance(message, Mapping):
            raise ValueError(f"a message is an object with role and content, not {message!r}")
    whole: str = tokenizer.apply_chat_template(list(chat), tokenize=False)
    characters = []
    for index, message in enumerate(chat):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise ValueError("it begins with the assistant, so there is nothing that the reply answers")
        opening: str = tokenizer.apply_chat_template(list(chat[:index]), tokenize=False, add_generation_prompt=True)
        closed: str = tokenizer.apply_chat_template(list(chat[: index + 1]), tokenize=False)
        if not (whole.startswith(closed) and closed.startswith(opening)):
            stop = _end_of_earlier_reply(whole, opening, closed, message.get("content"))
            if stop is not None:
                characters.append((len(opening), stop))
                continue
            raise UsageError(
                "the chat template renders a turn differently when others follow, so the assistant's spans cannot be "
                "found by comparison; give windows with a mask of your own"
            )
        characters.append((len(opening), len(closed)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = []
    for start, stop in characters:
        inside = [place for place, (a, b) in enumerate(encoded["offset_mapping"]) if a >= start and b <= stop and b > a]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return encoded["input_ids"], spans
