"""Kinds of input: which rows they have, what each asks, what is kept of it, and what is refused."""

from __future__ import annotations

import json
import os
import pickle

import pyarrow as pa
import pytest

import batch_tars
from batch_inputs import parse_shard
from batch_records import PlainForm, line_of
from qwen3vl_moe.errors import OptionError, PromptError, UserError
from qwen3vl_moe.json_files import parse_json
from tests.scripts.batches.conftest import QUESTION, picture, write_lines, write_parquet, write_tar


def asked(request):
    """The prompt and the images of a request, read as the engine would have them read."""
    messages = request.conversation() if callable(request.conversation) else request.conversation
    (message,) = messages
    *images, text = message["content"]
    return text["text"], [item["image"] for item in images]


def tables(source, start, stop):
    return pa.Table.from_batches(source.batches(start, stop), source.schema()).to_pylist()


@pytest.fixture
def parquet(tmp_path):
    columns = {
        "id": [f"r{n}" for n in range(20)],
        "prompt": [None if n == 4 else f"{n}?" for n in range(20)],
        "image": [{"bytes": picture(n) if n % 2 else None, "path": f"{n}.png"} for n in range(20)],
        "seed": [None if n else 7 for n in range(20)],
        "label": list(range(20)),
    }
    return write_parquet(tmp_path / "rows.parquet", columns)


@pytest.mark.parametrize("order", [range(20), [19, 0, 8, 7, 3, 18]])
def test_parquet_rows_are_read_when_they_are_wanted(opened, parquet, order):
    source = opened(parquet, rows=True, prompt="all?", drop=("image",))
    requests = source.requests(0, 20)
    assert source.notes == ["columns: id, prompt, image, seed; only kept: label"]
    assert [(request.index, request.id, request.params.seed) for request in requests] == [
        (n, f"r{n}", None if n else 7) for n in range(20)
    ]
    assert len({request.fingerprint for request in requests}) == 20
    for n in order:
        prompt, images = asked(requests[n])
        assert prompt == ("all?" if n == 4 else f"{n}?")
        assert images == [picture(n) if n % 2 else str(parquet.parent / f"{n}.png")]
        kept = {"id": f"r{n}", "prompt": None if n == 4 else f"{n}?", "seed": None if n else 7, "label": n}
        assert requests[n].row() == kept
    assert [row["label"] for row in tables(source, 5, 18)] == list(range(5, 18))


def test_parquet_in_parts_and_in_other_processes(opened, parquet):
    """Each part is cut at the end of a row group; a copy of the source reads the same."""
    source = opened(parquet, prompt="all?")
    assert source.cuts(8) == [(0, 8), (8, 16), (16, 20)]
    assert source.cuts(10) == [(0, 16), (16, 20)]
    assert source.cuts(1) == [*((n, n + 1) for n in range(16)), (16, 20)]  # a group is cut if it is far too large
    asked(source.requests(0, 1)[0])  # something has been read
    copy = pickle.loads(pickle.dumps(source.part(8, 16)))
    ours, theirs = source.requests(0, 20)[8:16], copy.requests(8, 16)
    assert [request.fingerprint for request in theirs] == [request.fingerprint for request in ours]
    assert [asked(request) for request in theirs] == [asked(request) for request in ours]


def test_forms_of_columns(opened, tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Hi"}]}]
    source = opened(write_parquet(tmp_path / "a.parquet", {"messages": [json.dumps(messages), "no", None]}), prompt="x")
    good, bad, none = source.requests(0, 3)
    assert good.conversation()[0]["content"][0]["image"] == str(tmp_path / "a.png")
    with pytest.raises(PromptError, match=r"row 1 of a.parquet: messages is a text that is no JSON"):
        bad.conversation()
    assert asked(none) == ("x", [])
    two = {"pictures": [[picture(0), picture(1)], []], "question": ["both?", "none?"], "name": ["p", "q"]}
    named = {"prompt_column": "question", "image_column": "pictures", "id_column": "name"}
    source = opened(write_parquet(tmp_path / "b.parquet", two), **named)
    requests = source.requests(0, 2)
    assert [asked(request) for request in requests] == [("both?", [picture(0), picture(1)]), ("none?", [])]
    assert [request.id for request in requests] == ["p", "q"]
    wrong = {"prompt": [1], "temperature": [-1.0]}
    (request,) = opened(write_parquet(tmp_path / "c.parquet", wrong)).requests(0, 1)
    assert "row 0 of c.parquet: temperature=-1.0" in request.error
    (request,) = opened(write_parquet(tmp_path / "d.parquet", {"prompt": [1]})).requests(0, 1)
    with pytest.raises(PromptError, match=r"row 0 of d.parquet: the prompt is no text"):
        request.conversation()


def test_several_files_are_one_input(opened, tmp_path):
    for number in range(3):
        columns = {"prompt": [f"{number}.{n}" for n in range(5)]}
        write_parquet(tmp_path / f"{number}.parquet", columns, rows_per_group=2)
    for path in (tmp_path, tmp_path / "*.parquet"):
        source = opened(path)
        assert [asked(request)[0] for request in source.requests(4, 11)] == [
            "0.4",
            *(f"1.{n}" for n in range(5)),
            "2.0",
        ]
        assert source.cuts(4)[:2] == [(0, 4), (4, 9)]
    write_parquet(tmp_path / "9.parquet", {"prompt": ["x"], "label": [1]})
    with pytest.raises(UserError, match=r"9.parquet has other columns than .*0.parquet"):
        opened(tmp_path)


@pytest.fixture
def tar(tmp_path):
    files = []
    for n in range(6):
        key = f"./{'long' * 40}/{n:03d}"  # a name that takes headers of its own
        files += [(f"{key}.png", picture(n))] if n != 3 else []
        files += [(f"{key}.txt", f"{n}? é".encode()), (f"{key}.meta.json", b'{"a": 1}')]
    return write_tar(tmp_path / "rows.tar", files)


def test_samples_of_a_tar(opened, tar):
    source = opened(tar, rows=True, prompt_column="txt")
    assert source.notes == ["columns: __key__, png, txt; only kept: meta.json"]
    requests = pickle.loads(pickle.dumps(source.part(1, 6))).requests(1, 6)
    assert [request.id[-3:] for request in requests] == ["001", "002", "003", "004", "005"]
    assert [r.fingerprint for r in requests] == [r.fingerprint for r in source.requests(0, 6)][1:]
    for n, request in enumerate(requests, start=1):
        if n == 3:
            with pytest.raises(PromptError, match=r"sample .*003 of rows.tar has no image \(png\)"):
                request.conversation()
        else:
            assert asked(request) == (f"{n}? é", [picture(n)])
        assert request.row() == {"__key__": request.id, "txt": f"{n}? é", "meta.json": '{"a": 1}'}
    assert [row["png"] for row in tables(source, 2, 5)] == [picture(2), None, picture(4)]


def test_a_file_in_a_tar_that_is_too_large_is_not_read(opened, tar, monkeypatch):
    monkeypatch.setattr(batch_tars, "MAX_FILE_BYTES", 100)
    (request,) = opened(tar, prompt="x").requests(0, 1)
    with pytest.raises(PromptError, match=r"sample .*000 of rows.tar has a file of more than"):
        request.conversation()


def test_a_folder_of_images(opened, tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.png", "a.JPG", "sub/c.webp", "notes.txt", "more.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(name.encode())
    source = opened(tmp_path, prompt=QUESTION)
    assert source.notes == ["passed over, as no image: 2 of '.txt'"]
    requests = source.requests(0, 3)
    assert [request.id for request in requests] == ["a.JPG", "b.png", "sub/c.webp"]
    assert [asked(request) for request in requests] == [(QUESTION, [tmp_path / request.id]) for request in requests]
    assert tables(source, 1, 3) == [{"path": "b.png"}, {"path": "sub/c.webp"}]
    assert [r.id for r in pickle.loads(pickle.dumps(source.part(2, 3))).requests(2, 3)] == ["sub/c.webp"]
    (tmp_path / "b.png").write_bytes(b"another picture")
    patterned = opened(tmp_path / "**/*.webp", prompt=QUESTION).requests(0, 1)
    assert [request.id for request in patterned] == ["sub/c.webp"]
    assert [a.fingerprint == b.fingerprint for a, b in zip(requests, source.requests(0, 3), strict=True)] == [
        True,
        False,
        True,
    ]


def test_lines_in_parts_and_as_columns(opened, tmp_path):
    lines = [{"id": n, "prompt": f"{n}?", "n": 1, "extra": [n]} for n in range(7)]
    lines[3] = "{broken"
    source = opened(write_lines(tmp_path / "a.jsonl", lines), keep_input=True)
    part = pickle.loads(pickle.dumps(source.part(2, 5)))
    assert part.requests(2, 5) == source.requests(0, 7)[2:5]
    assert (
        part.schema()
        == source.schema()
        == pa.schema([("id", pa.int64()), ("prompt", pa.string()), ("n", pa.int64()), ("extra", pa.string())])
    )
    rows = tables(part, 2, 5)
    assert [row["id"] for row in rows] == [2, None, 4]
    assert rows[0] == {"id": 2, "prompt": "2?", "n": 1, "extra": "[2]"}
    fewer = opened(tmp_path / "a.jsonl", keep_input=True, rows=True, drop=("extra", "n"))
    assert fewer.requests(0, 1)[0].row == {"id": 0, "prompt": "0?"}
    strict = opened(tmp_path / "a.jsonl")
    assert "the key 'extra' is unknown" in strict.requests(0, 1)[0].error


def test_a_prompt_for_lines_that_bring_none(opened, tmp_path):
    source = opened(write_lines(tmp_path / "a.jsonl", [{"image": "a.png"}, {"prompt": "own"}]), prompt=QUESTION)
    assert [asked(request)[0] for request in source.requests(0, 2)] == [QUESTION, "own"]


@pytest.mark.parametrize(
    ("files", "given", "options", "message"),
    [
        ({"a.parquet": b"x"}, "a.parquet", {"prompt": "x"}, "a.parquet cannot be read as parquet"),
        ({"a.tar": b"x" * 600}, "a.tar", {"prompt": "x"}, "a.tar cannot be read as a tar"),
        ({"a.tar": b""}, "a.tar", {"prompt": "x"}, "a.tar"),
        ({}, "no.parquet", {"prompt": "x"}, "no.parquet cannot be read: No such file"),
        ({"a.tar.gz": b""}, "a.tar.gz", {}, "a.tar.gz is compressed; unpack it"),
        ({"a.tar": b"", "b.jsonl": b""}, "", {}, "more than one kind, 'a.tar' among them; give a pattern"),
        ({"a.jsonl": b"", "b.jsonl": b""}, "", {}, "2 files of JSON lines; give one, or join them"),
        ({"a.txt": b""}, "", {"prompt": "x"}, "has no image"),
        ({"a.txt": b""}, "", {}, "has no image"),
        ({"a.png": b""}, "", {}, "is images: --prompt says what to ask of each"),
        ({"a.png": b""}, "*.jpg", {"prompt": "x"}, "no file is of that pattern"),
        ({"a.jsonl": b"{}"}, "a.jsonl", {"image_column": "x"}, "--image-column is for parquet and tars"),
        ({"a.jsonl": b"{}"}, "a.jsonl", {"drop": ("x",)}, "--drop x: no line of .* has that key"),
        ({"a.jsonl": b'{"n": 1}'}, "a.jsonl", {"drop": ("n",), "rows": True}, "--drop goes with --keep-input"),
        (
            {"a.jsonl": b'{"custom_id": "a", "body": 1}'},
            "a.jsonl",
            {"prompt": "x"},
            "--prompt means nothing for OpenAI",
        ),
        ({"a.jsonl": b"{}"}, "a.jsonl", {"served_model_name": "x"}, "--served-model-name is for OpenAI's batch format"),
        ({"a.png": b""}, "", {"prompt": "x", "served_model_name": "x"}, "--served-model-name is for OpenAI's"),
    ],
)
def test_inputs_that_cannot_be_used(opened, tmp_path, files, given, options, message):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path / given, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "rows.parquet has label, text: --prompt-column names the prompt's"),
        ({"prompt_column": "x"}, "--prompt-column x: .*rows.parquet has label, text"),
        ({"prompt": "x", "image_column": "picture"}, "--image-column picture: "),
        ({"prompt": "x", "drop": ("picture",)}, "--drop picture: "),
    ],
)
def test_columns_that_are_not_there(opened, tmp_path, options, message):
    write_parquet(tmp_path / "rows.parquet", {"text": ["a"], "label": [1]})
    with pytest.raises(OptionError, match=message):
        opened(tmp_path / "rows.parquet", **options)


def test_shards_are_all_rows_once():
    for total in (0, 1, 15, 16, 100):
        shards = [parse_shard(f"{n}/16", total) for n in range(16)]
        assert [row for start, stop in shards for row in range(start, stop)] == list(range(total))
        assert max(b - a for a, b in shards) - min(b - a for a, b in shards) <= 1
    assert parse_shard(None, 9) == (0, 9)
    for text, message in (("16/16", "from 0/16 to 15/16"), ("3", "such as 3/16"), ("0/0", "such as"), ("-1/2", "such")):
        with pytest.raises(OptionError, match=message):
            parse_shard(text, 9)


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(opened, tmp_path):
    for name in ("a.tar", "a.parquet", "a.jsonl"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}.* is not a regular file"):
            opened(tmp_path / name, prompt=None if name == "a.jsonl" else "x")


def test_numbers_that_json_does_not_have(opened, tmp_path):
    """An answer that held NaN could not be read back."""
    columns = {"prompt": ["a", "b"], "score": [float("nan"), 1.5], "list": [[float("inf")], [b"x", b"y"][:0]]}
    source = opened(write_parquet(tmp_path / "a.parquet", columns), rows=True)
    records = [PlainForm(True).record(request, "no") for request in source.requests(0, 2)]
    assert [record["input"]["score"] for record in records] == [None, 1.5]
    assert parse_json(line_of(records[0]))["input"]["list"] == [None]
