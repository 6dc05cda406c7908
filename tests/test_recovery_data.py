"""Where training windows come from: packed text on disk, and chats with the loss on replies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import psutil
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foldgpt.corpus import texts
from foldgpt.errors import SourceError, UsageError
from foldgpt.recovery.chat import chat_tokens
from foldgpt.recovery.packing import packed_windows
from foldgpt.recovery.windows import TrainingWindows
from tiny import BOS_ID, EOS_ID, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def documents(folder: Path, name: str, words: list[str]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    return str(path)


def test_the_first_windows_keep_their_marks() -> None:
    ids = torch.arange(24).reshape(4, 6)
    scored, begins = ids % 3 > 0, ids % 4 == 0
    first = TrainingWindows(ids, scored, begins).first(2)
    assert first.scored_WT is not None and first.begins_WT is not None
    assert torch.equal(first.ids_WT, ids[:2])
    assert torch.equal(first.scored_WT, scored[:2]) and torch.equal(first.begins_WT, begins[:2])
    assert len(first) == 2 and "positions" in first[1]


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
    ids = torch.cat([held_out.ids_WT, train.ids_WT])
    kinds = [{letter for letter in tokenizer.decode(row) if letter in "ab"} for row in ids]
    assert kinds == [{"a"}, {"b"}] * 4 + [{"a"}]


def test_a_long_file_does_not_keep_others_from_their_turns(tmp_path: Path) -> None:
    """A .txt file is one document; taken whole, it would be all that is trained and judged on."""
    texts = []
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(f"{letter} " * 4000)
        texts.append(str(tmp_path / f"{letter}.txt"))
    more = documents(tmp_path, "c", ["c" * 60] * 3)  # ends soon
    train, held_out = packed_windows(
        [*texts, more], tiny_tokenizer(300), tmp_path / "ids", context=32, num_tokens=640, num_held_out=96
    )
    tokenizer = tiny_tokenizer(300)
    judged = [set(tokenizer.decode(row)) & set("abc") for row in held_out.ids_WT]
    assert judged == [{"a"}, {"b"}, {"c"}]
    trained = [letter for row in train.ids_WT for letter in set(tokenizer.decode(row)) & set("abc")]
    assert {letter: trained.count(letter) for letter in "abc"} == {"a": 8, "b": 8, "c": 4}


def test_a_text_without_lines_is_read_in_pieces_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 10)
    cases = ["one two three four five six", "a line\nand another one\n\nend", "x" * 35, "", "0123456789", "012345678\n"]
    for case in cases:
        path = tmp_path / "a.txt"
        path.write_text(case)
        pieces = list(texts._TextFile(path))
        assert "".join(pieces) == case and max(map(len, pieces), default=0) < 20
        assert not any(piece.endswith(" ") for piece in pieces)


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


def test_no_document_is_held_out_and_trained_on(tmp_path: Path) -> None:
    """With a text given twice, what the second brings may be what the first had held out."""
    words = [f"word{i:03d}" for i in range(60)]
    text, other = documents(tmp_path, "a", words), documents(tmp_path, "b", words)
    tokenizer = tiny_tokenizer(300)

    def pack(*specs: str) -> None:
        packed_windows(specs, tokenizer, tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)

    with pytest.raises(UsageError, match=r"a\.jsonl is given twice: a document that is held out"):
        pack(text, other, text)
    with pytest.raises(UsageError, match=r"\*\.jsonl and .*b\.jsonl have a text in common: a document"):
        pack(other, str(tmp_path / "*.jsonl"))
    with pytest.raises(UsageError, match="demo:wikipedia is given twice"):
        pack("demo:wikipedia", "demo:wikipedia")
    for one, another in (
        ("hub:a/b", "hub:a/b?revision=main"),
        ("hub:a/b?split=train[:50%25]", "hub:a/b"),
    ):
        with pytest.raises(UsageError, match="have a text in common: a document"):
            pack(one, another)
    with pytest.raises(UsageError, match=r"self:\?seed=0 and self: have a text in common: a document"):
        texts.check_none_twice(["self:", "self:?seed=0"])
    assert not (tmp_path / "ids").exists()
    pack(text, other)
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps({"text": word, "said": word[::-1]}) + "\n" for word in words))
    pack(str(both), f"{both}#said"), "columns are texts of their own"
    plain = tmp_path / "plain.txt"
    plain.write_text(" ".join(words))
    for spec, column in ((plain, "x"), (both, "messages")):
        with pytest.raises(UsageError, match="have a text in common"):
            pack(str(spec), f"{spec}#{column}")


@pytest.mark.parametrize("name", ["context", "num_tokens", "num_held_out", "seed"])
def test_numbers_of_windows_are_whole(tmp_path: Path, name: str) -> None:
    text, tokenizer = documents(tmp_path, "a", [f"word{i:03d}" for i in range(60)]), tiny_tokenizer(300)
    given = {"context": 16, "num_tokens": 64, "num_held_out": 16, "seed": 3}
    train, _ = packed_windows([text], tokenizer, tmp_path / "ids", **given)
    again, _ = packed_windows([text], tokenizer, tmp_path / "ids", **{**given, name: numpy.int64(given[name])})
    assert torch.equal(train.ids_WT, again.ids_WT)
    for wrong in (float(given[name]), True):
        with pytest.raises(UsageError, match=f"{name} must be a whole number, not {wrong}"):
            packed_windows([text], tokenizer, tmp_path / "ids", **{**given, name: wrong})


@pytest.mark.parametrize("lost", ["ids", "marks", "cut ids", "cut marks"])
def test_windows_that_lost_a_part_are_made_again(tmp_path: Path, lost: str) -> None:
    """As a copy of the folder that was cut short has them; also what a kill left half-written goes."""
    text, tokenizer, folder = documents(tmp_path, "a", [f"w{i:03d}" for i in range(60)]), tiny_tokenizer(300), tmp_path

    def pack() -> tuple[torch.Tensor, set[Path]]:
        train, _ = packed_windows([text], tokenizer, folder / "i", context=16, num_tokens=64, num_held_out=16)
        return train.ids_WT.clone(), set((folder / "i").iterdir())

    first, files = pack()
    (path,) = (folder / "i").glob(f"*.{lost.split()[-1]}")
    whole = path.read_bytes()
    if lost.startswith("cut"):
        path.write_bytes(whole[:10])
    else:
        path.unlink()
    (path.parent / f".foldgpt-partial-{path.name}-abcd1234").write_bytes(b"half")
    again, there = pack()
    assert torch.equal(first, again) and path.read_bytes() == whole and there == files


def test_a_text_that_is_too_short_leaves_nothing(tmp_path: Path) -> None:
    text = documents(tmp_path, "a", ["short"])
    with pytest.raises(SourceError, match="0 tokens in full windows of 16, and 48 are asked for"):
        packed_windows([text], tiny_tokenizer(300), tmp_path / "ids", context=16, num_tokens=32, num_held_out=16)
    assert not (tmp_path / "ids").exists()
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


def chats(folder: Path, name: str, *chats: Any, column: str = "messages") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({column: chat}) + "\n" for chat in chats))
    return str(path)


def turns(*contents: str) -> list[dict[str, str]]:
    """User and assistant, by turns."""
    return [{"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(contents)]


def with_template(template: str | None, **how: Any) -> Any:
    tokenizer = tiny_tokenizer(300, **how)
    tokenizer.chat_template = template
    return tokenizer


def test_the_loss_of_chats_is_on_replies_alone_and_that_of_text_everywhere(tmp_path: Path) -> None:
    tokenizer = with_template(TEMPLATE)
    talks = chats(tmp_path, "a", *(turns(f"ask{i:02d}", f"reply{i:02d}", "more", f"end{i:02d}") for i in range(40)))
    text = documents(tmp_path, "b", [f"TEXT{i:02d}" for i in range(100)])
    train, held_out = packed_windows(
        [talks, text], tokenizer, tmp_path / "ids", context=32, num_tokens=512, num_held_out=64
    )
    ids, scored = (torch.cat([getattr(held_out, name), getattr(train, name)]) for name in ("ids_WT", "scored_WT"))
    whole = tokenizer.decode(ids.flatten())
    assert "<user>ask" in whole and "<assistant>reply" in whole and "<eos>TEXT" in whole
    # A window of each by turns.
    talked, read = (slice(start, None, 2) for start in (0, 1))
    said = tokenizer.decode(ids[talked][scored[talked].bool()]).split("<eos>")[:-1]
    kinds = [word.rstrip("0123456789") for word in said]
    assert kinds == (["reply", "end"] * len(kinds))[: len(kinds)] and len(kinds) > 6
    assert bool(scored[read].all())
    labels = train[3]["labels"]
    assert torch.equal(labels != -100, train.scored_WT[3].bool())  # type: ignore[index]
    # Text alone has no mask.
    plain, _ = packed_windows([text], tokenizer, tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)
    assert plain.scored_WT is None


def test_chats_are_kept_apart_as_a_whole(tmp_path: Path) -> None:
    """By where they begin: what ends a document ends each turn in most templates."""
    tokenizer = with_template(TEMPLATE, bos=True)
    talks = chats(tmp_path, "a", *(turns(f"q{i:03d}", f"a{i:03d}") for i in range(40)))

    def read(separate: bool) -> TrainingWindows:
        return packed_windows(
            [talks],
            tokenizer,
            tmp_path / "ids",
            context=64,
            num_tokens=512,
            num_held_out=64,
            separate_documents=separate,
        )[0]

    apart = read(True)
    assert apart.begins_WT is not None and read(False).begins_WT is None
    item = apart[2]
    starts = [place for place, position in enumerate(item["positions"].tolist()) if position == 0]
    assert len(starts) > 2
    for start in starts:
        # Each with BOS in front, which the template does not write.
        assert int(item["input_ids"][start]) == BOS_ID
    between = tokenizer.decode(item["input_ids"][starts[1] : starts[2]])
    assert between.count("<user>") == 1 and between.count("<eos>") == 2
    assert len(list((tmp_path / "ids").glob("*.ids"))) == 1


def test_chats_in_other_columns_and_kinds_of_files(tmp_path: Path) -> None:
    tokenizer = with_template(TEMPLATE)
    talk = [turns("ask", "reply")] * 30
    named = chats(tmp_path, "a", *talk, column="talk")
    table = pyarrow.Table.from_pylist([{"id": 1, "messages": chat} for chat in talk])
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    read = [
        packed_windows([spec], tokenizer, tmp_path / "ids", context=48, num_tokens=96, num_held_out=48)[0].ids_WT
        for spec in (f"{named}#talk", str(tmp_path / "b.parquet"))
    ]
    assert torch.equal(*read)
    with pytest.raises(SourceError, match=r"there is no column 'text'. Valid choices: talk"):
        packed_windows([named], tokenizer, tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)
    with pytest.raises(UsageError, match=r"a.jsonl line 1: this is a chat. Chats are trained on"):
        next(texts.read_documents([f"{named}#talk"]))


def said_of(chat: Any, tokenizer: Any) -> str:
    ids, is_said = chat_tokens(chat, tokenizer, "here")
    assert isinstance(ids, list) and len(ids) == len(is_said)
    said: str = tokenizer.decode([token for token, own in zip(ids, is_said, strict=True) if own])
    return said


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
    assert (
        said_of(turns("ask", " first ", "more", "second"), with_template(STOCK_WAYS[way]))
        == {
            "llama": "first<eos>second<eos>",
            "gemma": "first end\nsecond end\n",
            "qwen": " first <eos>think/think second<eos>",
        }[way]
    )


def test_c2_reasoning_that_a_template_drops_later_is_refused() -> None:
    with pytest.raises(UsageError, match="differently when others follow"):
        said_of(turns("ask", "because/thinkfirst", "more", "second"), with_template(STOCK_WAYS["qwen"]))


@pytest.mark.parametrize("trims", [False, True])
def test_what_is_said_includes_spaces_whatever_the_tokenizer_calls_their_place(trims: bool) -> None:
    """Byte-level tokenizers may trim spaces off a token's place in the text; one of nothing else then has none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={sign: index for index, sign in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trims)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TEMPLATE, eos_token="|")
    chat = [{"role": "user", "content": "a  b"}, {"role": "assistant", "content": "  if x:\n    y  z"}]
    assert said_of(chat, tokenizer) == "  if x:\n    y  z|"


def test_chats_without_replies_leave_nothing_to_learn(tmp_path: Path) -> None:
    talks = chats(tmp_path, "a", *[turns(f"only a question {i}") for i in range(40)])
    with pytest.raises(UsageError, match=r"a.jsonl: in the held-out windows the assistant says nothing"):
        packed_windows([talks], with_template(TEMPLATE), tmp_path / "ids", context=16, num_tokens=64, num_held_out=16)


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        ("{{ messages|length }}" + TEMPLATE, turns("ask", "a", "ask"), "here: .* differently when others follow"),
        (TEMPLATE, turns("ask", "a")[1:], "here: the chat cannot be rendered: it begins with the assistant"),
        (
            TEMPLATE,
            [{"from": "human", "value": "ask"}],
            r"here: .* a message is an object with role and content, not \{'from': 'human'",
        ),
        (
            TEMPLATE,
            [{"role": "user", "value": "ask"}, *turns("ask", "a")[1:]],
            r"here: .* a message is an object with role and content, not \{'role': 'user', 'value'",
        ),
        (TEMPLATE, ["ask"], "here: .* a message is an object with role and content, not 'ask'"),
        (
            "{% for m in messages %}{{ '<' + m.content }}{% endfor %}",
            [{"role": "user", "content": 5}],
            "here: the chat cannot be rendered: can only concatenate",
        ),
        (
            "{% if messages[0].role == 'user' %}{{ raise_exception('no users here') }}{% endif %}",
            turns("ask", "a"),
            "here: the chat cannot be rendered: no users here",
        ),
        (None, turns("ask", "a"), "here: the tokenizer has no chat template"),
        (
            TEMPLATE,
            [*turns("ask"), {"role": "assistant", "content": [{"type": "text", "text": "a"}]}],
            r"here: .* the template takes text alone, and the content of message 2 is \[\{'type'",
        ),
        (
            TEMPLATE,
            [*turns("ask"), {"role": "assistant", "value": "a"}],
            "here: .* message 2 is the assistant's and has no content, but role, value",
        ),
        (
            "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] or '' }}{% endfor %}",
            [*turns("ask"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            "here: .* message 2 calls tools, which the template leaves out",
        ),
    ],
    ids=[
        "looks ahead",
        "assistant first",
        "other keys",
        "no prompt",
        "no messages",
        "no text",
        "template refuses",
        "no template",
        "parts",
        "another key",
        "tools left out",
    ],
)
def test_chats_that_cannot_be_rendered_are_refused(template: str | None, chat: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        said_of(chat, with_template(template))


def test_templates_that_know_parts_and_tools_have_them() -> None:
    parts = (
        "{% for m in messages %}<{{ m.role }}>{% for p in m.content or [] %}{{ p.text }}{% endfor %}"
        "{% for c in m.tool_calls or [] %}[{{ c.name }}]{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = {"role": "user", "content": [{"type": "text", "text": "ask"}]}
    said = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    assert "yes" in said_of([asked, said], with_template(parts))
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "find"}]}
    assert "[find]" in said_of([asked, called], with_template(parts))
    adds = (
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'tool' %}{{ m.content | tojson }}"
        "{% elif m.tool_calls %}{% for c in m.tool_calls %}[{{ c.name }}]{% endfor %}{% else %}"
        "{{ '' + m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    talk = [*turns("ask"), called, {"role": "tool", "content": [22.5]}, {"role": "assistant", "content": "22.5"}]
    assert said_of(talk, with_template(adds)) == "[find]<eos>22.5<eos>"
