"""Text in, windows out: nothing read that is not needed, nothing scored twice, every choice on record."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from foldgpt.corpus import calibration_windows, evaluation_windows, read_documents, reused_texts, texts
from foldgpt.corpus.segments import segments
from foldgpt.corpus.windows import _READ_AHEAD
from foldgpt.errors import FoldGPTError, SourceError, UsageError
from tiny import BOS_ID, EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer(300)
"""One token for each byte, so that a test can count."""


def _write_jsonl(path: Path, texts: list[str], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: text, "id": 1}) + "\n" for text in texts))
    return str(path)


def _words(count: int, word: str = "word") -> list[str]:
    return [f"{word}{number:04}" for number in range(count)]


# ---------------------------------------------------------------------------------------------- documents


def test_a_text_file_is_one_document_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 10)
    content = " = Title = \n\n\r\nnaïve — 日本語 🙂\n no newline at the end"
    (tmp_path / "a.raw").write_bytes(content.encode())
    assert list(read_documents([str(tmp_path / "a.raw")])) == [content]


def test_every_kind_of_file_and_a_glob_over_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("first")
    _write_jsonl(tmp_path / "b.jsonl", ["second", "third"])
    table = pyarrow.table({"text": ["fourth", "fifth"], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "sub").mkdir()
    expected = ["first", "second", "third", "fourth", "fifth"]
    assert list(read_documents([f"{tmp_path}/*.*"])) == expected
    monkeypatch.chdir(tmp_path)
    assert list(read_documents(["*.*"])) == expected
    assert list(read_documents(["b.jsonl", "a.txt"])) == ["second", "third", "first"]


def test_another_column_can_be_named(tmp_path: Path) -> None:
    spec = _write_jsonl(tmp_path / "a.jsonl", ["x"], column="content")
    assert list(read_documents([f"{spec}#content"])) == ["x"]
    table = pyarrow.table({"text": ["no"], "body": ["yes"], "meta/text": ["of a path"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert list(read_documents([f"{tmp_path}/b.parquet#body"])) == ["yes"]
    assert list(read_documents([f"{tmp_path}/*.parquet#meta/text"])) == ["of a path"]


def test_a_number_sign_may_be_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "C#").mkdir()
    for name in ("a#1.txt", "C#/b.txt"):
        (tmp_path / name).write_text(name)
    assert list(read_documents(["~/a#1.txt", f"{tmp_path}/C#/*.txt"])) == ["a#1.txt", "C#/b.txt"]
    assert reused_texts(["~/a#1.txt"], {"calibration": [f"{tmp_path}/a#1.txt"]})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"text": "a\ud800b"}', r"a\.jsonl line 2: holds '\\ud800', half of a character"),
        (r'{"text": [{"role": "user", "content": "a\ud800b"}]}', r"a\.jsonl line 2: holds '\\ud800'"),
        ('{"text": ' + "[" * 200_000, r"a\.jsonl line 2: "),
    ],
    ids=["text", "chat", "deep"],
)
def test_a_row_that_no_tokenizer_takes_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(SourceError, match=message):
        list(read_documents([f"{tmp_path}/a.jsonl"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": \n', r"bad\.jsonl line 3: not valid JSON"),
        ("list.jsonl", b'{"text": "a"}\n["b"]\n', r"list\.jsonl line 2: a JSON object is needed, not list"),
        ("null.jsonl", b'{"text": null}\n', r"null\.jsonl line 1: column 'text' holds NoneType, not text"),
        ("column.jsonl", b'{"texts": "a"}\n', r"column\.jsonl line 1: .*'text'.* Did you mean 'texts'\?"),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin\.jsonl line 1: not valid JSON"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8"),
        ("bad.parquet", b"PAR1 but not really", r"cannot read .*bad\.parquet"),
        ("a.csv", b"text\na\n", r"a\.csv: known kinds of text are \.txt"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        list(read_documents([str(tmp_path / name)]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/corpsu.jsonl", r"no text file matches .*Did you mean 'corpus\.jsonl'"),
        ("{folder}/*.txt", "no text file matches"),
        ("{folder}", "is a folder"),
        ("demo:wikpedia", "Did you mean 'wikipedia'"),
        ("hub:c4?spilt=train", "Did you mean 'split'"),
        ("{folder}/plain.raw#body", "no columns"),
        ("{folder}/table.parquet#texts", "Did you mean 'text'"),
    ],
)
def test_a_spec_that_means_nothing_gets_a_suggestion(tmp_path: Path, spec: str, message: str) -> None:
    _write_jsonl(tmp_path / "corpus.jsonl", ["x"])
    (tmp_path / "plain.raw").write_text("x")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), tmp_path / "table.parquet")
    with pytest.raises(FoldGPTError, match=message):
        list(read_documents([spec.format(folder=tmp_path)]))


def test_one_text_is_no_list_of_letters() -> None:
    with pytest.raises(UsageError, match=r"texts are a list, and 'a.txt' is one text: give \['a.txt'\]"):
        list(read_documents("a.txt"))


def test_a_pattern_or_a_user_that_python_does_not_know_is_one_line(tmp_path: Path) -> None:
    """Python 3.11 and 3.12 refuse ** beside other characters, and a user who does not exist has no home."""
    with pytest.raises(SourceError, match=r"no text file matches .*/data/\*\*\.jsonl"):
        list(read_documents([f"{tmp_path}/data/**.jsonl"]))
    with pytest.raises(SourceError, match=r"cannot read ~nobody-here/x\.txt: .*home"):
        list(read_documents(["~nobody-here/x.txt"]))


def test_a_hub_text_is_streamed_with_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        calls.append((name, config, options))
        yield from ({"body": word} for word in ("a", "b"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents(["hub:owner/name?config=en&split=test&column=body"])) == ["a", "b"]
    names = [texts.open_texts([spec])[0].name for spec in ("hub:owner/name?config=en", "hub:owner/name?split=test")]
    assert names == ["hub:owner/name?config=en&split=train", "hub:owner/name?split=test"]
    assert calls == [("owner/name", "en", {"split": "test", "revision": None, "streaming": True})]
    with pytest.raises(SourceError, match="owner/name row 1: there is no column 'text'"):
        list(read_documents(["hub:owner/name"]))


def test_a_hub_that_cannot_be_reached_is_one_short_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError) as caught:
        list(read_documents(["hub:owner/name"]))
    assert str(caught.value) == "cannot read the hub data set owner/name: Couldn't reach the hub"


# -------------------------------------------------------------------------------------------- calibration


def test_calibration_packs_documents_with_eos_between(tmp_path: Path) -> None:
    documents = _words(40)
    spec = _write_jsonl(tmp_path / "a.jsonl", documents)
    windows = calibration_windows([spec], TOKENIZER, context=9, num_tokens=40 * 9)
    assert windows.ids.shape == (40, 9)
    assert windows.ids.dtype == torch.int64
    assert (windows.ids == EOS_ID).sum(1).tolist() == [1] * 40
    found = [TOKENIZER.decode(row[row != EOS_ID]) for row in windows.ids]
    assert sorted(found) == documents
    assert found != documents, "the documents must be mixed"


def test_calibration_depends_on_the_seed_alone(tmp_path: Path) -> None:
    spec = _write_jsonl(tmp_path / "a.jsonl", _words(100))
    first, again, other = (
        calibration_windows([spec], TOKENIZER, context=9, num_tokens=90, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.ids, again.ids)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint


def test_texts_give_equal_shares(tmp_path: Path) -> None:
    small = _write_jsonl(tmp_path / "a.jsonl", _words(30, "aaaa"))
    (tmp_path / "b.txt").write_text("b" * 5000)
    windows = calibration_windows([small, str(tmp_path / "b.txt")], TOKENIZER, context=16, num_tokens=16 * 12)
    is_b = windows.ids == TOKENIZER("b", add_special_tokens=False)["input_ids"][0]
    assert is_b.all(1).sum() == 6
    assert (~is_b.any(1)).sum() == 6


def test_a_long_document_gives_no_more_than_the_others_as_long_as_there_are_others(tmp_path: Path) -> None:
    """Of a text whose long documents fill the windows, what is measured on it holds for those documents."""
    long = [letter * 900 for letter in "abc"]
    spec = _write_jsonl(tmp_path / "a.jsonl", [*long, *(f"{number:02d}" * 4 for number in range(40))])
    windows = calibration_windows([spec], TOKENIZER, context=10, num_tokens=200)
    ids = windows.ids.flatten().tolist()
    for letter in "abc":
        assert ids.count(TOKENIZER(letter, add_special_tokens=False)["input_ids"][0]) <= 10
    # When all have given one segment, those that have more give another.
    windows = calibration_windows([spec], TOKENIZER, context=10, num_tokens=1000)
    counts = [(windows.ids == TOKENIZER(letter, add_special_tokens=False)["input_ids"][0]).sum() for letter in "abc"]
    assert sum(counts) > 500 and max(counts) - min(counts) <= 20
    assert windows.protocol["documents_read"] == 43


def test_a_segment_is_from_a_random_place_of_its_document(tmp_path: Path) -> None:
    letters = "abcdefghij"
    spec = _write_jsonl(tmp_path / "a.jsonl", ["".join(letter * 10 for letter in letters)] * 50)
    windows = calibration_windows([spec], TOKENIZER, context=10, num_tokens=400)
    begins = {TOKENIZER.decode(row[:1]) for row in windows.ids}
    assert len(begins) > 5
    assert all(len(set(row.tolist())) == 1 for row in windows.ids[:1])


def _segments(documents: list[str], seed: int = 0, length: int = 10) -> list[tuple[int, str]]:
    found = segments(
        texts.Text("a", "", lambda _: iter([(text,) for text in documents]), lambda: None),
        lambda text: [ord(letter) for letter in text],
        [],
        length=length,
        order=random.Random(seed),
        read_ahead=100,
    )
    return [(number, "".join(map(chr, segment))) for number, segment in found]


def test_every_token_is_in_one_segment_and_documents_take_turns() -> None:
    documents = ["".join(map(chr, numbers)) for numbers in (range(300, 705), range(1000, 1007), range(2000, 2033))]
    found = _segments(documents)
    assert sorted("".join(segment for _, segment in found)) == sorted("".join(documents))
    assert max(len(segment) for _, segment in found) == 10
    rounds = [number for number, _ in found]
    assert rounds[:3] == [0, 1, 2] and sorted(rounds[3:5]) == rounds[3:5] and len(set(rounds[-30:])) == 1


def test_longer_documents_give_their_segment_sooner() -> None:
    """Else tokens of long documents would be rarer than they are in the text."""
    documents = ["a" * 400, *["b" * 10] * 40]
    is_first = [_segments(documents, seed)[0][1][0] == "a" for seed in range(200)]
    assert 60 < sum(is_first) < 140  # as many characters as all others together


def test_windows_of_several_texts_come_in_turns_and_share_no_document_across_a_cut(tmp_path: Path) -> None:
    """Parts of the windows are held out from what is fitted on the others."""
    specs = [_write_jsonl(tmp_path / f"{name}.jsonl", [name * 200 + f"{i:02d}" for i in range(30)]) for name in "ab"]
    windows = calibration_windows(specs, TOKENIZER, context=20, num_tokens=400)
    a, b = (TOKENIZER(name, add_special_tokens=False)["input_ids"][0] for name in "ab")
    assert [bool((row == a).any()) for row in windows.ids] == [True, False] * 10
    assert [bool((row == b).any()) for row in windows.ids] == [False, True] * 10


def test_calibration_reads_no_more_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def documents(_: Path, __: str) -> Iterator[tuple[str]]:
        nonlocal read
        while True:
            read += 1
            yield ("x" * 99,)

    monkeypatch.setitem(texts._READERS, ".py", documents)
    windows = calibration_windows([__file__], TOKENIZER, context=100, num_tokens=1000)
    assert windows.protocol["documents_read"] == 10
    assert read <= _READ_AHEAD + 10


def test_a_long_text_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_PIECE_CHARACTERS", 100)
    # The end is not UTF-8, far enough away that no read-ahead of the file layer meets it.
    (tmp_path / "a.txt").write_bytes(b"one line of text\n" * 20_000 + b"\xff")
    windows = calibration_windows([str(tmp_path / "a.txt")], TOKENIZER, context=10, num_tokens=1000)
    assert windows.ids.shape == (100, 10)


def test_a_text_that_is_too_short_says_how_long_it_is(tmp_path: Path) -> None:
    spec = _write_jsonl(tmp_path / "a.jsonl", ["12345", "12345"])
    with pytest.raises(SourceError, match=r"a\.jsonl is too short: it has 12 tokens, and 2 window\(s\)"):
        calibration_windows([spec], TOKENIZER, context=10, num_tokens=20)
    with pytest.raises(UsageError, match="do not fill one window"):
        calibration_windows([spec], TOKENIZER, context=10, num_tokens=9)


@pytest.mark.parametrize(
    ("adds_bos", "asked", "expected"), [(True, "auto", 1), (True, False, 0), (False, "auto", 0), (False, True, 1)]
)
def test_bos_comes_first_in_each_window(tmp_path: Path, adds_bos: bool, asked: Any, expected: int) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh" * 30)
    tokenizer = tiny_tokenizer(300, bos=adds_bos)
    for windows in (
        calibration_windows([f"{tmp_path}/a.txt"], tokenizer, context=8, num_tokens=80, bos=asked),
        evaluation_windows([f"{tmp_path}/a.txt"], tokenizer, context=8, bos=asked),
    ):
        assert (windows.ids == BOS_ID).sum(1).tolist() == [expected] * len(windows.ids)
        assert (windows.ids[:, 0] == BOS_ID).all() == bool(expected)
        assert windows.protocol["bos"] == bool(expected)


# --------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_the_whole_text_in_order(tmp_path: Path) -> None:
    """Field note M5: tokens, context, stride, BOS and join rule are on record."""
    text = "".join(_words(13))  # 104 characters
    (tmp_path / "a.txt").write_text(text)
    windows = evaluation_windows([f"{tmp_path}/a.txt"], TOKENIZER, context=10)
    assert TOKENIZER.decode(windows.ids.flatten()) == text[:100]
    assert windows.score_from.tolist() == [1] * 10
    assert windows.protocol == {
        "texts": ["a.txt"],
        "join": [""],
        "characters": 104,
        "tokens": 104,
        "text_complete": True,
        "context": 10,
        "stride": 10,
        "windows": 10,
        "bos": False,
        "tokens_scored": 90,
        "vocabulary_size": 300,
    }
    assert json.loads(json.dumps(windows.protocol)) == windows.protocol


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 9, None])
def test_each_token_is_scored_once_whatever_the_stride(tmp_path: Path, bos: bool, stride: int | None) -> None:
    text = "".join(chr(0x21 + number % 90) for number in range(90))  # no two tokens alike
    (tmp_path / "a.txt").write_text(text)
    windows = evaluation_windows([f"{tmp_path}/a.txt"], TOKENIZER, context=10, stride=stride, bos=bos)
    scored = torch.cat([row[start:] for row, start in zip(windows.ids, windows.score_from, strict=True)])
    assert len(scored) == len(scored.unique()) == windows.protocol["tokens_scored"]
    if bos:
        assert TOKENIZER.decode(scored) == text[: len(scored)], "after BOS even the first token is scored"
    elif stride in (1, 3, 9):
        assert TOKENIZER.decode(scored) == text[1 : len(scored) + 1]


def test_documents_are_joined_by_the_rule_that_is_recorded(tmp_path: Path) -> None:
    a, b = _write_jsonl(tmp_path / "a.jsonl", ["one", "two"]), str(tmp_path / "b.txt")
    Path(b).write_text("three")
    windows = evaluation_windows([a, b], TOKENIZER, context=15)
    assert TOKENIZER.decode(windows.ids[0]) == "one\n\ntwo\n\nthree"
    assert windows.protocol["join"] == ["\n\n", ""]


def test_a_few_windows_are_the_first_of_all(tmp_path: Path) -> None:
    spec = _write_jsonl(tmp_path / "a.jsonl", _words(2000))
    everything = evaluation_windows([spec], TOKENIZER, context=20)
    first = evaluation_windows([spec], TOKENIZER, context=20, max_windows=7)
    assert torch.equal(first.ids, everything.ids[:7])
    assert not first.protocol["text_complete"]
    assert first.protocol["characters"] < everything.protocol["characters"]
    assert first.fingerprint != everything.fingerprint
    more = evaluation_windows([spec], TOKENIZER, context=20, max_windows=10**6)
    assert more.fingerprint == everything.fingerprint
    assert more.protocol == everything.protocol


def test_the_protocol_does_not_depend_on_the_place_of_the_file(tmp_path: Path) -> None:
    found = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("some text " * 20)
        found.append(evaluation_windows([f"{tmp_path}/{folder}/a.txt"], TOKENIZER, context=20))
    assert found[0].protocol == found[1].protocol
    assert found[0].fingerprint == found[1].fingerprint


def test_a_stride_of_the_context_is_no_overlap_whether_or_not_windows_begin_with_bos(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text " * 20)
    for bos in (False, True):
        whole, none = (
            evaluation_windows([f"{tmp_path}/a.txt"], TOKENIZER, context=20, stride=stride, bos=bos)
            for stride in (20, None)
        )
        assert whole.fingerprint == none.fingerprint and whole.protocol == none.protocol


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 50}, r"too short: it has 20 tokens"),
        ({"context": 1}, "nothing to predict"),
        ({"context": 10, "stride": 11}, "stride must be between 1 and 10"),
        ({"context": 10, "stride": 11, "bos": True}, r"between 1 and 9 .* or the context \(10\), not 11"),
        ({"context": 10, "stride": 0}, "stride must be between 1 and 10"),
        ({"context": 10, "max_windows": 0}, "at least one window"),
    ],
)
def test_windows_that_make_no_sense_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    (tmp_path / "a.txt").write_text("x" * 20)
    with pytest.raises(FoldGPTError, match=message):
        evaluation_windows([f"{tmp_path}/a.txt"], TOKENIZER, **options)


def test_bos_is_refused_where_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 20)
    tokenizer = tiny_tokenizer(300)
    tokenizer.bos_token = None
    with pytest.raises(UsageError, match="no BOS token"):
        evaluation_windows([f"{tmp_path}/a.txt"], tokenizer, context=8, bos=True)


def test_a_text_is_found_again_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    uses = {"calibration": ["demo:wikipedia", str(tmp_path / "*.txt")], "training": ["b.txt", "gone.txt"]}
    tested = ["demo:wikipedia", "demo:wikipedia-test", "a.txt", "./b.txt", "hub:wikitext"]
    hub = {"training": ["hub:a/b?column=body&config=en"]}
    assert list(reused_texts(["hub:a/b?config=en&split=train", "hub:a/b?config=en&split=test", "hub:a/b"], hub)) == [
        "hub:a/b?config=en&split=train"
    ]
    assert reused_texts(tested, uses) == {
        "demo:wikipedia": ["calibration"],
        "a.txt": ["calibration"],
        "./b.txt": ["calibration", "training"],
    }


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    """Records are JSON, which could not hold it."""
    (tmp_path / "good.txt").write_text("text")
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system takes no such name")
    with pytest.raises(SourceError, match=r"cannot read 'caf.udce9\.txt' in .*: its name is not UTF-8"):
        list(read_documents([f"{tmp_path}/*.txt"]))


@pytest.mark.parametrize("spec", ["x" * 300, "A text as it is, given in place of its file. " * 20])
def test_what_is_too_long_for_a_name_is_no_text_file(spec: str) -> None:
    with pytest.raises(SourceError, match=f"no text file matches {spec[:60]}…: File name too long"):
        list(read_documents([spec]))


def test_a_path_is_taken_as_its_name_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    assert list(read_documents([tmp_path / "a.txt"])) == ["text"]  # type: ignore[list-item]


def test_a_table_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    column = pyarrow.array([b"good", b"\xff\xfe"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column.view(pyarrow.string())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet behind row 0: not UTF-8 text: invalid start byte"):
        list(read_documents([f"{tmp_path}/a.parquet"]))
