"""Where training windows come from: packed text on disk, and chats with the loss on replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import normalizers

from foldgpt.corpus import texts
from foldgpt.errors import SourceError, UsageError
from foldgpt.recovery.chat import chat_windows
from foldgpt.recovery.packing import packed_windows
from tiny import BOS_ID, EOS_ID, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def documents(folder: Path, name: str, words: list[str]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return str(path)


def test_windows_hold_whole_documents_in_a_seeded_order_and_are_found_again(tmp_path: Path) -> None:
    words = [f"word{i:03d}" for i in range(60)]
    text, tokenizer = documents(tmp_path, "a", words), tiny_tokenizer(300)

    def read(seed: int) -> list[str]:
        train, held_out = packed_windows(
            [text], tokenizer, tmp_path / "ids", context=16, num_tokens=256, num_held_out=64, seed=seed
        )
        assert train.ids_WT.shape == (16, 16) and held_out.ids_WT.shape == (4, 16)
        ids = torch.cat([held_out.ids_WT, train.ids_WT]).flatten()
        return tokenizer.decode(ids).split("<eos>")[:-1]

    first = read(0)
    assert len(set(first)) == len(first) == 40 and set(first) <= set(words)
    assert first != words[:40]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").iterdir()}
    assert read(0) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").iterdir()} == files
    assert read(1) != first
    documents(tmp_path, "a", [word.upper() for word in words])  # the same name, other contents
    assert set(read(0)) <= {word.upper() for word in words}


def test_no_more_is_read_or_held_than_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text without end, and a text file that is read in pieces and not to its end; the ids are on disk."""
    read = 0

    def endless(_: Path, __: str) -> Iterator[tuple[str]]:
        nonlocal read
        while True:
            read += 1
            yield ("x" * 99,)

    monkeypatch.setitem(texts._READERS, ".py", endless)
    train, _ = packed_windows(
        [__file__], tiny_tokenizer(300), tmp_path / "ids", context=100, num_tokens=2000, num_held_out=100
    )
    assert read <= 1024 + 21
    (file,) = (tmp_path / "ids").glob("*.ids")
    assert str(file) in {region.path for region in psutil.Process().memory_maps()} and len(train) == 20
    monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 100)
    # The end is not UTF-8, far enough away that no read-ahead of the file layer meets it.
    (tmp_path / "a.txt").write_bytes(b"one line of text\n" * 20_000 + b"\xff")
    train, _ = packed_windows(
        [str(tmp_path / "a.txt")], tiny_tokenizer(300), tmp_path / "ids", context=10, num_tokens=1000, num_held_out=100
    )
    assert train.ids_WT.shape == (100, 10)


def test_windows_are_those_of_the_tokenizer_whatever_its_vocabulary(tmp_path: Path) -> None:
    text = documents(tmp_path, "a", [f"Word{i:03d}" for i in range(30)])

    def read(tokenizer: Any) -> torch.Tensor:
        train, _ = packed_windows([text], tokenizer, tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)
        return train.ids_WT

    plain, lower = tiny_tokenizer(300), tiny_tokenizer(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert plain.get_vocab() == lower.get_vocab()
    assert not torch.equal(read(plain), read(lower))
    plain.pad_token = plain.eos_token
    plain(["one", "three words more"], padding=True, truncation=True, max_length=8)
    read(plain)
    assert len(list((tmp_path / "ids").glob("*.ids"))) == 2, "what its last call left behind is not part of it"


def test_texts_take_turns(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    texts = [documents(tmp_path, name, [f"{name}{i:06d}" for i in range(30)]) for name in ("a", "b")]
    train, held_out = packed_windows(texts, tokenizer, tmp_path / "ids", context=16, num_tokens=128, num_held_out=16)
    ids = torch.cat([held_out.ids_WT, train.ids_WT]).flatten()
    assert [word[0] for word in tokenizer.decode(ids).split("<eos>")[:-1]] == ["a", "b"] * 9


def test_bos_begins_documents_and_windows_where_the_tokenizer_begins_texts_with_it(tmp_path: Path) -> None:
    text = documents(tmp_path, "a", [f"word{i:03d}" for i in range(30)])

    def read(bos: bool, context: int) -> torch.Tensor:
        train, held_out = packed_windows(
            [text],
            tiny_tokenizer(300, bos=bos),
            tmp_path / "ids",
            context=context,
            num_tokens=8 * context,
            num_held_out=context,
        )
        return torch.cat([held_out.ids_WT, train.ids_WT])

    with_bos = read(bos=True, context=12)
    assert bool((with_bos[:, 0] == BOS_ID).all())
    after_end = with_bos[:, 1:][with_bos[:, :-1] == EOS_ID]
    assert len(after_end) and bool((after_end == BOS_ID).all())
    # Apart from BOS the ids are those of the tokenizer without it, none lost where windows begin.
    without = read(bos=False, context=12)
    assert BOS_ID not in without
    stream = with_bos[with_bos != BOS_ID]
    assert torch.equal(stream[: without.numel()], without.flatten()[: len(stream)])
    # A window that a document begins has one BOS, not two: "wordNNN", BOS and EOS are nine tokens.
    fitting = read(bos=True, context=9)
    assert fitting[:, 0].eq(BOS_ID).all() and fitting[:, 1].ne(BOS_ID).all() and fitting[:, -1].eq(EOS_ID).all()


def test_a_text_that_is_too_short_leaves_nothing(tmp_path: Path) -> None:
    text = documents(tmp_path, "a", ["short"])
    with pytest.raises(SourceError, match="0 tokens in full windows of 16, and 48 are asked for"):
        packed_windows([text], tiny_tokenizer(300), tmp_path / "ids", context=16, num_tokens=32, num_held_out=16)
    assert not list((tmp_path / "ids").iterdir())
    with pytest.raises(UsageError, match="do not fill a window"):
        packed_windows([text], tiny_tokenizer(300), tmp_path / "ids", context=16, num_tokens=32, num_held_out=0)


def test_a_kill_once_the_windows_lie_there_leaves_them_to_be_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = documents(tmp_path, "a", [f"a{i:06d}" for i in range(30)])
    replace = Path.replace

    def killed(self: Path, target: Path) -> Path:
        replace(self, target)
        if Path(target).suffix == ".ids":
            raise KeyboardInterrupt
        return Path(target)

    def read() -> None:
        packed_windows([text], tiny_tokenizer(300), tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        read()
    assert list((tmp_path / "ids").glob("*.ids"))
    monkeypatch.undo()
    read()


def test_the_loss_is_on_replies_alone() -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = TEMPLATE
    chat = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "end"},
    ]
    windows = chat_windows([chat, chat[:2]], tokenizer, context=64, num_windows=2)
    assert windows.scored_WT is not None
    said = [tokenizer.decode(ids[mask]) for ids, mask in zip(windows.ids_WT, windows.scored_WT, strict=True)]
    assert said == ["reply<eos>end<eos>", "reply<eos>"]
    assert int(windows.ids_WT[1, -1]) == EOS_ID
    labels = windows[1]["labels"]
    assert int((labels != -100).sum()) == len("reply") + 1


#: The ways of the stock templates of Llama 3.1, Gemma 3 and Qwen 3, none of which marks what the assistant says: a
#: preamble of the template's own and trimmed turns; the assistant called otherwise and turns joined by line ends;
#: reasoning that is put before the last reply, if only an empty one, and dropped once another question follows.
STOCK_WAYS = {
    "llama": (
        "{{ '<eos>' }}{% if messages[0].role != 'system' %}{{ 'preamble|' }}{% endif %}"
        "{% for m in messages %}{{ m.role + '|' + m.content | trim + '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}"
    ),
    "gemma": (
        "{% for m in messages %}{{ 'start ' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
        "{{ m.content | trim }}{{ ' end\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'start model\n' }}{% endif %}"
    ),
    "qwen": (
        "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ m.role + '|' }}{% if m.role == 'assistant' and loop.index0 < last.user %}"
        "{{ m.content.split('/think')[-1] }}{% else %}{% if m.role == 'assistant' and loop.last %}{{ 'think/think ' }}"
        "{% endif %}{{ m.content }}{% endif %}{{ '<eos>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant|' }}{% endif %}"
    ),
}


@pytest.mark.parametrize("way", STOCK_WAYS)
def test_c2_replies_are_found_in_templates_that_do_not_mark_them(way: str) -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = STOCK_WAYS[way]
    chat = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": " first "},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "second"},
    ]
    windows = chat_windows([chat], tokenizer, context=96, num_windows=1)
    assert windows.scored_WT is not None
    said = tokenizer.decode(windows.ids_WT[0][windows.scored_WT[0]])
    assert (
        said
        == {
            "llama": "first<eos>second<eos>",
            "gemma": "first end\nsecond end\n",
            "qwen": " first <eos>think/think second<eos>",
        }[way]
    )


def test_c2_reasoning_that_a_template_drops_later_is_refused() -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = STOCK_WAYS["qwen"]
    chat = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "because/thinkfirst"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "second"},
    ]
    with pytest.raises(UsageError, match="differently when others follow"):
        chat_windows([chat], tokenizer, context=96, num_windows=1)


def test_chats_without_replies_and_templates_that_look_ahead_are_refused() -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = TEMPLATE
    asked = [{"role": "user", "content": "ask"}]
    with pytest.raises(UsageError, match="no token of these chats"):
        chat_windows([asked], tokenizer, context=32, num_windows=1)
    with pytest.raises(UsageError, match="1 chats, and 2"):
        chat_windows([asked], tokenizer, context=32, num_windows=2)
    tokenizer.chat_template = "{{ messages|length }}" + TEMPLATE
    with pytest.raises(UsageError, match="differently when others follow"):
        chat_windows([[*asked, {"role": "assistant", "content": "a"}, *asked]], tokenizer, context=32, num_windows=1)
    replied = [*asked, {"role": "assistant", "content": "a"}]
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(UsageError, match="chat 2 cannot be rendered: it begins with the assistant"):
        chat_windows([replied, replied[1:]], tokenizer, context=32, num_windows=2)
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m.content }}{% endfor %}"
    with pytest.raises(UsageError, match="chat 2 cannot be rendered: can only concatenate"):
        chat_windows([replied, [{"role": "user", "content": 5}]], tokenizer, context=32, num_windows=2)
    tokenizer.chat_template = "{% if messages[0].role == 'user' %}{{ raise_exception('no users here') }}{% endif %}"
    with pytest.raises(UsageError, match="chat 1 cannot be rendered: no users here"):
        chat_windows([replied], tokenizer, context=32, num_windows=1)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        chat_windows([asked], tokenizer, context=32, num_windows=1)
