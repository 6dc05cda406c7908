"""What a model writes: greedy continuations of the beginnings of some text, for people to read."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from foldgpt.families import decode, input_device, num_positions
from foldgpt.progress import bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from foldgpt.corpus import Windows

_PROMPT_TOKENS = 32
_NEW_TOKENS = 48


@dataclass(frozen=True)
class Generation:
    """One continuation, always taking the likeliest token.

    Attributes:
        prompt: the beginning that was given.
        text: what the model wrote, up to its end-of-text token or 48 tokens.
    """

    prompt: str
    text: str


@torch.inference_mode()
def generations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: Windows, *, num: int
) -> list[Generation]:
    """Continue the beginnings of the first windows of a text.

    Args:
        model: a causal language model, on any device. Its training flag is as before when this returns.
        tokenizer: the one that the windows were made with.
        windows: token ids [num_windows, context]; the first 32 tokens of a window are a prompt (half of a window
            shorter than 64).
        num: how many windows; fewer if there are fewer.
    """
    num_tokens = min(_PROMPT_TOKENS, windows.ids.shape[1] // 2)
    prompts_BT = windows.ids[:num, :num_tokens]
    was_training = model.training
    model.eval()
    try:
        with bar("Generating", len(prompts_BT)) as progress:
            written = []
            for prompt_T in prompts_BT:
                written.append(
                    Generation(
                        tokenizer.decode(prompt_T, skip_special_tokens=True),
                        tokenizer.decode(_continue(model, tokenizer, prompt_T), skip_special_tokens=True),
                    )
                )
                progress.advance()
            return written
    finally:
        model.train(was_training)


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_T: torch.Tensor) -> list[int]:
    # Not `generate`: a checkpoint's own generation config may sample or penalise, and then two models do not compare.
    room = (num_positions(model.config) or sys.maxsize) - len(prompt_T)
    new: list[int] = []
    device = input_device(model)
    ids_BT, cache = prompt_T[None].to(device), None
    while len(new) < min(_NEW_TOKENS, room):
        logits_BTV, cache = decode(model, ids_BT, cache)
        token = int(logits_BTV[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
        ids_BT = torch.tensor([[token]], device=device)
    return new
