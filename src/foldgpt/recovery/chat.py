"""Chats as token ids, and which of them the assistant says: the loss is on those alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from foldgpt.errors import UsageError

Message = Mapping[str, Any]


def chat_tokens(
    chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, place: str
) -> tuple[list[int], list[bool]]:
    """Token ids of a chat as the tokenizer's template renders it, and for each whether it is the assistant's.

    Many chat templates do not mark what the assistant says. So the spans are found by comparison: a reply is what the
    rendered chat has more with it than without it, behind the template's own opening of an assistant turn.

    Args:
        chat: `{"role": …, "content": …}`, one after another.
        tokenizer: the model's tokenizer, with a chat template.
        place: where the chat is from, for error messages.

    Raises:
        UsageError: there is no template, or it cannot render the chat or renders it differently once another turn
            follows.
    """
    if not tokenizer.chat_template:
        raise UsageError(f"{place}: the tokenizer has no chat template, so chats cannot be rendered")
    try:
        whole, replies = _rendered(chat, tokenizer)
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except (TemplateError, ValueError, TypeError, NotImplementedError) as error:  # a template raises what it likes
        raise UsageError(f"{place}: the chat cannot be rendered: {error}") from error
    if "offset_mapping" not in encoded:
        raise UsageError(f"{place}: to tell what the assistant says, the model's tokenizer has to be a fast one")
    ids: list[int] = encoded["input_ids"]
    is_said = [False] * len(ids)
    for start, stop in replies:
        for token, (a, b) in enumerate(encoded["offset_mapping"]):
            # Some tokenizers trim spaces off, so that a token of nothing else stands for an empty part.
            is_said[token] |= start <= a < b <= stop or start < a == b <= stop
    return ids, is_said


def _rendered(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A chat as text, and from where to where each reply runs in it."""
    for message in chat:
        # A template may take what it does not find for empty.
        is_one = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        # Of replies it is looked at below what they hold.
        if not is_one or not (message["role"] == "assistant" or "content" in message):
            raise ValueError(f"a message is an object with role and content, not {message!r}")
    whole: str = tokenizer.apply_chat_template([dict(message) for message in chat], tokenize=False)
    replies = []
    for index, message in enumerate(chat):
        if message.get("role") != "assistant":
            continue
        if index == 0:
            raise ValueError("it begins with the assistant, so there is nothing that the reply answers")
        earlier = [dict(message) for message in chat[:index]]
        opening: str = tokenizer.apply_chat_template(earlier, tokenize=False, add_generation_prompt=True)
        closed: str = tokenizer.apply_chat_template([*earlier, dict(message)], tokenize=False)
        if not isinstance(message.get("content"), str):
            _check_reply(message, index + 1, closed, earlier, tokenizer)
        if not (whole.startswith(closed) and closed.startswith(opening)):
            stop = _end_of_earlier_reply(whole, opening, closed, message.get("content"))
            if stop is None:
                raise ValueError(
                    "the template renders a turn differently when others follow, so the assistant's spans cannot be "
                    "found by comparison; from Python, give TrainingWindows with a mask of your own"
                )
            replies.append((len(opening), stop))
            continue
        replies.append((len(opening), len(closed)))
    return whole, replies


def _check_reply(
    message: Message, number: int, closed: str, earlier: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a reply that is no text where a template writes it as Python does, or leaves it out.

    The student would learn to say that.

    Args:
        message: the reply.
        number: which message of the chat it is.
        closed: the chat up to it, as it is rendered.
        earlier: the messages before it.
        tokenizer: has the template.
    """
    content = message.get("content")
    # Some templates know parts of content, and write their text.
    if content and str(content) in closed:
        raise ValueError(f"the template takes text alone, and the content of message {number} is {content!r}")
    if content:
        return
    if not message.get("tool_calls"):
        raise ValueError(f"message {number} is the assistant's and has no content, but {', '.join(message)}")
    silent = {name: value for name, value in message.items() if name != "tool_calls"} | {"content": ""}
    try:
        without = tokenizer.apply_chat_template([*earlier, silent], tokenize=False)
    except (TemplateError, ValueError, TypeError):  # it takes no reply that says nothing, so it does look at the calls
        return
    if without == closed:
        raise ValueError(f"message {number} calls tools, which the template leaves out, and says nothing else")


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
