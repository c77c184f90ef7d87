"""generate.py over every kind of input, into both kinds of output: what is kept, and how a job is taken up again."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

import batch_run
from tests.scripts.batches.conftest import QUESTION, picture, records, write_lines, write_parquet, write_tar

COUNT, BAD = 9, 5
ANSWER = [
    "index",
    "request",
    "text",
    "finish_reason",
    "answer_tokens",
    "prompt_tokens",
    "image_tokens",
    "choices",
    "error",
]


def image(number: int) -> bytes:
    return b"no picture" if number == BAD else picture(number)


@pytest.fixture
def inputs(tmp_path):
    """Nine pictures, one of them bad, as every kind of input; with the options that each needs."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for n in range(COUNT):
        (folder / f"{n}.png").write_bytes(image(n))
    lines = [{"id": n, "prompt": QUESTION, "image": f"folder/{n}.png"} for n in range(COUNT)]
    columns = {"image": [image(n) for n in range(COUNT)], "question": [QUESTION] * COUNT, "label": list(range(COUNT))}
    files = [(f"{n}.{end}", content) for n in range(COUNT) for end, content in (("png", image(n)), ("cls", b"%d" % n))]
    return {
        "lines": (write_lines(tmp_path / "a.jsonl", lines), []),
        "parquet": (write_parquet(tmp_path / "a.parquet", columns), ["--prompt-column", "question"]),
        "tars": (write_tar(tmp_path / "a.tar", files), ["--prompt", QUESTION]),
        "folder": (folder, ["--prompt", QUESTION]),
    }


KEPT = {
    "lines": ["id", "prompt", "image"],
    "parquet": ["image", "question", "label"],
    "tars": ["__key__", "png", "cls"],
    "folder": ["path"],
}


def test_every_kind_gives_the_same_answers(generated, inputs, plain, tmp_path):
    texts = []
    for kind, (source, options) in inputs.items():
        status, stderr = generated(plain.path, source, tmp_path / f"{kind}.jsonl", *options)
        assert (status, "8 answers, 1 errors" in stderr) == (1, True)
        lines = records(tmp_path / f"{kind}.jsonl")
        assert [record["index"] for record in lines] == list(range(COUNT))
        assert "is not an image that can be read" in lines[BAD]["error"]
        assert all(("input" in record) == (kind != "lines") for record in lines)
        texts.append([record.get("text") for record in lines])
        status, stderr = generated(plain.path, source, tmp_path / f"{kind}.parquet", *options)
        assert (status, "8 answers, 1 errors" in stderr) == (1, True)
        table = pq.read_table(tmp_path / f"{kind}.parquet")
        assert table.column_names == KEPT[kind] + ANSWER
        rows = table.to_pylist()
        assert [row["text"] for row in rows] == texts[-1]
        for key in ("index", "request", "error", "finish_reason", "answer_tokens", "prompt_tokens", "image_tokens"):
            assert [row[key] for row in rows] == [record.get(key) for record in lines]
        for row, record in zip(rows, lines, strict=True):
            for key, value in record.get("input", {}).items():
                assert row[key] == value
    assert texts[1:] == texts[:-1]
    assert [row["image"] for row in pq.read_table(tmp_path / "parquet.parquet").to_pylist()] == [
        *map(image, range(COUNT))
    ]
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == sorted(
        [".jsonl", ".parquet"] * 4 + [".jsonl", ".parquet", ".tar"]
    ), "no file of work in progress is left"


def test_a_table_is_taken_up_again(generated, inputs, plain, tmp_path, monkeypatch):
    source, options = inputs["parquet"]
    output = tmp_path / "out.parquet"
    command = plain.path, source, output, *options, "--drop", "image", "--prefix", "model_"
    real, written = batch_run.AnswerFile.write, []

    def ended(self, request, *result):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(request.index)
        real(self, request, *result)

    with monkeypatch.context() as patch:
        patch.setattr(batch_run.AnswerFile, "write", ended)
        assert generated(*command)[0] == 130
    assert not output.exists()
    status, stderr = generated(*command)
    assert (status, "has 4 of 9 answers; going on with the other 5" in stderr) == (1, True)
    table = pq.read_table(output)
    assert table.column_names == ["question", "label", *(f"model_{name}" for name in ANSWER)]
    assert table.column("model_index").to_pylist() == list(range(COUNT))
    before = output.read_bytes()
    status, stderr = generated(*command)
    assert (status, "nothing to do" in stderr, output.read_bytes() == before) == (1, True, True)
    status, stderr = generated(*command, "--max-tokens", 3)
    assert (status, "answers other requests than" in stderr, output.read_bytes() == before) == (2, True, True)


def test_shards_are_the_whole(generated, inputs, plain, tmp_path):
    source, options = inputs["tars"]
    generated(plain.path, source, tmp_path / "all.jsonl", *options)
    for n in range(3):
        generated(plain.path, source, tmp_path / f"{n}.jsonl", *options, "--shard", f"{n}/3")
    joined = b"".join((tmp_path / f"{n}.jsonl").read_bytes() for n in range(3))
    assert joined == (tmp_path / "all.jsonl").read_bytes()
    status, stderr = generated(plain.path, source, tmp_path / "1.jsonl", *options, "--shard", "2/3")
    assert (status, "line 1 answers another request" in stderr) == (2, True)


def test_nothing_to_answer(generated, plain, tmp_path):
    source = write_lines(tmp_path / "a.jsonl", [])
    for name in ("out.jsonl", "out.parquet"):
        status, stderr = generated(plain.path, source, tmp_path / name)
        assert (status, "0 answers, 0 errors; nothing to do" in stderr) == (0, True)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


def test_keys_of_lines_are_kept_if_they_are_asked_for(generated, plain, tmp_path):
    line = {"id": "a", "prompt": "Hi", "label": [1, {"b": None}]}
    source = write_lines(tmp_path / "a.jsonl", [line, "{"])
    generated(plain.path, source, tmp_path / "out.jsonl", "--keep-input")
    first, second = records(tmp_path / "out.jsonl")
    assert (first["input"], second["input"]) == (line, None)
    assert "text" in first
    assert generated(plain.path, source, tmp_path / "strict.jsonl")[0] == 1
    assert "the key 'label' is unknown" in records(tmp_path / "strict.jsonl")[0]["error"]


def test_datasets_reads_the_table_as_it_wrote_it(generated, plain, tmp_path):
    """Its own description of the columns, pictures among them, holds for those that were added."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [{"bytes": picture(n), "path": None} for n in range(3)], "label": [1, 2, 3]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "in.parquet")
    generated(plain.path, tmp_path / "in.parquet", tmp_path / "out.parquet", "--prompt", QUESTION)
    table = pq.read_table(tmp_path / "out.parquet")
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(described) == table.column_names
    back = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(back.features["image"], datasets.Image)
    assert back["label"] == [1, 2, 3]
    assert back["text"] == table.column("text").to_pylist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "the input has a column 'text', as the answers have; --prefix answer_ names theirs 'answer_text'"),
        (["--shard", "4/4"], "--shard 4/4: shards are from 0/4 to 3/4"),
        (["--image-column", "x"], "--image-column x: "),
    ],
)
def test_mistakes(generated, plain, tmp_path, options, message):
    source = write_parquet(tmp_path / "a.parquet", {"text": ["a"], "prompt": ["Hi"]})
    status, stderr = generated(plain.path, source, tmp_path / "out.parquet", *options)
    assert status == 2
    assert f"error: {message}" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_what_is_no_table_of_answers_is_left_alone(generated, inputs, plain, tmp_path):
    (source, options), output = inputs["parquet"], tmp_path / "out.parquet"
    for content in (b"notes", source.read_bytes()):
        output.write_bytes(content)
        status, stderr = generated(plain.path, source, output, *options)
        assert (status, "out.parquet is no table of answers; give another --output" in stderr) == (2, True)
        assert output.read_bytes() == content
