"""Tiny things that tests share: a tokenizer built in-process, so that no test needs a file or a network."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

#: Ids of the special tokens of every tiny tokenizer.
BOS_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2

#: Their names, in the order of the ids.
_SPECIAL = ("<bos>", "<eos>", "<unk>")


def tiny_tokenizer(vocab_size: int = 128, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token for each byte, the most common bytes of English text first.

    Args:
        vocab_size: number of tokens, three special ones included. With 259 or more every byte has a token;
            with fewer the rare ones are the unknown token.
        bos: put `<bos>` before each text when special tokens are asked for, as Llama and Gemma do.

    Returns:
        The tokenizer: `<bos>` is 0, `<eos>` is 1, `<unk>` is 2. It has a chat template, which a save must keep.
    """
    if vocab_size <= len(_SPECIAL):
        raise ValueError(f"a tiny tokenizer needs more than {len(_SPECIAL)} tokens, not {vocab_size}")
    vocabulary = {token: index for index, token in enumerate(_SPECIAL)}
    for character in _byte_characters()[: vocab_size - len(_SPECIAL)]:
        vocabulary[character] = len(vocabulary)
    while len(vocabulary) < vocab_size:
        vocabulary[f"<extra{len(vocabulary)}>"] = len(vocabulary)

    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS_ID)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
    return tokenizer


def _byte_characters() -> list[str]:
    """The byte-level alphabet, the characters of common English text first, then the rest in a fixed order."""
    # "Ġ" and "Ċ" are how the byte-level alphabet writes the space and the new line.
    common = "Ġetaoinshrdlcumwfgypbvk.,ĊTAISCMBPRHDWELNFGOUJKVYQXZjxqz0123456789-'\"()=@;:/!?&$%*+#"
    rest = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(common))
    return [*dict.fromkeys(common), *rest]
