"""batch_ray.py on a real Ray of this machine: two actors on CPUs, three formats, actors and drivers that are killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batch_ray
from batch_inputs import InputOptions, Job, open_input
from batch_parts import Parts
from batch_run import Output
from qwen3vl_moe.engine import SamplingParams
from tests.docs_commands import calls_of
from tests.scripts.batches.conftest import PARAMS, QUESTION, picture, records, write_lines, write_parquet, write_tar

ROOT = Path(__file__).resolve().parents[3]
SIZES = {"lines": 72, "parquet": 64, "tars": 64}  # 200 rows
BAD = {"lines": (3, 40, 41, 71), "parquet": (0, 33, 50), "tars": (8, 9, 63)}
NEEDS = {"lines": [], "parquet": ["--prompt", QUESTION], "tars": ["--prompt-column", "txt"]}
MODEL = ["--model", "demo", "--dtype", "float32"]


def test_ray_is_absent(run, tmp_path, monkeypatch):
    monkeypatch.setattr(batch_ray.importlib.util, "find_spec", lambda name: None)
    status, stderr = run(batch_ray, "--input", tmp_path / "a.jsonl", "--output", tmp_path / "out")
    assert status == 2
    assert stderr == "error: Ray is not installed: pip install -e '.[ray]' (scripts/generate.py needs none)\n"


def test_progress_tells_workers_apart():
    counts = batch_ray.Counts(100)
    for worker, begun, ended, rows in (("a", 0.0, 2.0, 8), ("a", 1.0, 4.0, 8), ("b", 10.0, 12.0, 4)):
        counts.add({"worker": worker, "begun": begun, "ended": ended, "rows": rows, "errors": 1, "tokens": 10 * rows})
    assert counts.line(4.0) == (
        "20 of 100 rows, 3 errors, 5.0 rows/s, 50 answer tokens/s; "
        "2 workers, each 2.0 to 4.0 rows/s, 20.0 to 40.0 answer tokens/s"
    )
    assert list(counts.by_worker()) == [
        "worker a: 16 rows, 4.0 rows/s, 40 answer tokens/s",
        "worker b: 4 rows, 2.0 rows/s, 20 answer tokens/s",
    ]


def test_every_option_reaches_the_model(run, plain, tmp_path, monkeypatch):
    """Those of sampling and of the engine are generate.py's, and so are the fingerprints of what they give."""
    found = {}

    def answer(parts, load, actors, *_):
        found.update(load=load.keywords, actors=actors, request=parts.todo[0].source.requests(0, 1)[0])
        raise KeyboardInterrupt

    monkeypatch.setattr(batch_ray, "_answer", answer)
    monkeypatch.setattr(batch_ray.importlib.util, "find_spec", lambda name: True)
    source = write_lines(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "Hi"}])
    given = ["--top-p", "0.9", "--top-k", "5", "--min-p", "0.1", "--stop", "x", "--stop", "y", "--seed", "3"]
    given += ["--repetition-penalty", "1.1", "--sampling", '{"min_tokens": 2}', "--temperature", "0.5"]
    options = ["--engine", '{"block_size": 32}', "--min-pixels", "1024", "--max-num-seqs", "7", "--eager"]
    options += ["--max-prefill-tokens", "64", "--gpu-memory-utilization", "0.5", "--tensor-parallel-size", "2"]
    arguments = ["--model", plain.path, "--input", source, "--output", tmp_path / "out", *given, *options]
    status, _ = run(batch_ray, *arguments)
    assert status == 130
    sampled = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["x", "y"], "seed": 3, "repetition_penalty": 1.1}
    expected = SamplingParams(max_tokens=512, temperature=0.5, min_tokens=2, **sampled)
    assert found["request"].params == expected
    wanted = {"block_size": 32, "min_pixels": 1024, "max_num_seqs": 7, "enforce_eager": True, "max_prefill_tokens": 64}
    wanted |= {"gpu_memory_utilization": 0.5, "tensor_parallel_size": 2, "device": "cuda"}
    assert found["load"].items() >= wanted.items()
    assert found["actors"] == batch_ray.Actors(1, "GPU", 2)
    settings = {"model": str(plain.path), "max_pixels": None, "min_pixels": 1024, "engine": '{"block_size": 32}'}
    job = Job(expected, settings, InputOptions(), rows=False)
    assert open_input(source, job).requests(0, 1)[0].fingerprint == found["request"].fingerprint
    for option, said in (
        (["--engine", '{"data_parallel_size": 2}'], "--engine says data_parallel_size; here --actors are"),
        (["--engine", '{"device": "cpu"}'], "--engine says device, which this program has options of its own for"),
        (["--engine", '{"media_root": "/"}'], "--engine says media_root, which this program has options"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size 0: 1 or more is needed"),
        (["--sampling", "{"], "--sampling '{' is no JSON"),
    ):
        status, stderr = run(batch_ray, *arguments[:6], *option)
        assert (status, stderr.startswith(f"error: {said}"), stderr.count("\n")) == (2, True, 1)


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests here."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    pytest.importorskip("ray.data", reason="Ray Data is not installed")
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "scripts"))
    ray.init("local", num_cpus=4, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """200 rows with ten bad ones, in three formats."""
    folder = tmp_path_factory.mktemp("inputs")

    def image(kind, number):
        return b"no picture" if number in BAD[kind] else picture(number)

    lines = []
    for n in range(SIZES["lines"]):
        (folder / f"{n}.png").write_bytes(image("lines", n))
        lines.append({"id": f"r{n}", "prompt": QUESTION, "image": f"{n}.png", "max_tokens": 2 + n % 5})
    lines[3], lines[41] = "{broken", {"id": "r41", "colour": "red"}
    columns = {"image": [image("parquet", n) for n in range(SIZES["parquet"])], "label": list(range(SIZES["parquet"]))}
    files = []
    for n in range(SIZES["tars"]):
        files += [(f"{n:04d}.png", image("tars", n)), (f"{n:04d}.txt", QUESTION.encode())]
    return {
        "lines": write_lines(folder / "rows.jsonl", lines),
        "parquet": write_parquet(folder / "rows.parquet", columns),
        "tars": write_tar(folder / "rows.tar", files),
    }


@pytest.fixture(scope="module")
def expected(generated, inputs, tmp_path_factory):
    """What generate.py answers, one process for each format."""
    folder, paths = tmp_path_factory.mktemp("expected"), {}
    for kind, source in inputs.items():
        paths[kind] = folder / f"{kind}.jsonl"
        status, _ = generated("demo", source, paths[kind], "--dtype", "float32", *NEEDS[kind])
        assert status == 1
        answers = records(paths[kind])
        assert [answer["index"] for answer in answers if "error" in answer] == list(BAD[kind])
    return paths


def parts_of(kind, source, folder):
    """The parts of a job as the program makes them."""
    names = {"parquet": {"prompt": QUESTION}, "tars": {"prompt_column": "txt"}, "lines": {}}[kind]
    job = Job(PARAMS, {"model": "demo", "max_pixels": None}, InputOptions(**names), rows=True)
    opened = open_input(source, job)
    output = Output.of(folder, opened.kind, "demo", keep_input=kind != "lines", prefix="", table=False)
    return Parts(folder, opened, job, output, 8)


def test_an_actor_is_killed(ray, inputs, expected, tmp_path):
    """Every row is there once, in order, with the very answers of generate.py."""
    jobs = {kind: parts_of(kind, source, tmp_path / kind) for kind, source in inputs.items()}
    todo = [part for parts in jobs.values() for part in parts.todo]
    options = {"device": "cpu", "dtype": "float32", "allow_private_hosts": False, "progress": False}
    load = partial(batch_ray._load, "demo", **options)
    done, killed, workers = 0, None, set()
    for part in batch_ray.answered_parts(todo, load, batch_ray.Actors(2, "CPU")):
        assert part["problem"] == ""
        done += part["rows"]
        workers.add(part["worker"])
        if killed is None:
            killed = part["worker"]
            os.kill(int(killed.rpartition(":")[2]), signal.SIGKILL)
    assert done == 200
    assert len(workers) > 1
    for kind, parts in jobs.items():
        again = parts_of(kind, inputs[kind], parts.folder)
        assert (again.todo, again.count_errors()) == ([], len(BAD[kind]))
        again.join(tmp_path / f"{kind}.jsonl")
        assert (tmp_path / f"{kind}.jsonl").read_bytes() == expected[kind].read_bytes()


def test_the_driver_is_killed(ray, run, inputs, expected, tmp_path):
    """The same command goes on with the parts that are not there, and makes one file of all."""
    output = tmp_path / "out.jsonl"
    arguments = [*MODEL, "--num-gpus", 0, "--temperature", 0, "--max-tokens", 4, "--rows-per-part", 4]
    arguments += ["--input", inputs["tars"], "--output", output, *NEEDS["tars"]]
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, ROOT / "scripts/batch_ray.py", *arguments, "--address", address]
    driver = subprocess.Popen([str(each) for each in command], stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out.jsonl.parts"
    while not list(parts.glob("part-*")):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.02)
    driver.kill()
    driver.communicate()
    assert 0 < len(list(parts.glob("part-*"))) < 16
    assert not output.exists()

    status, stderr = run(batch_ray, *arguments, "--max-tokens", 5)
    assert (status, "begun with another model or other options" in stderr) == (2, True)
    status, stderr = run(batch_ray, *arguments)
    assert status == 1
    done, left = re.search(r"out.jsonl.parts has (\d+) parts; going on with the other (\d+)", stderr).groups()
    assert (int(done) > 0, int(done) + int(left)) == (True, 16)
    assert f"{output} is complete: 61 answers, 3 errors; " in stderr
    assert "rows/s" in stderr
    assert output.read_bytes() == expected["tars"].read_bytes()
    assert not parts.exists()
    status, stderr = run(batch_ray, *arguments)
    assert (status, "nothing to do" in stderr) == (1, True)


def test_the_command_of_the_page_on_two_ranks(ray, run, generated, tmp_path, monkeypatch):
    """An actor takes two units of a machine, starts its other rank by itself, and answers as one rank does."""
    calls = calls_of((ROOT / "docs/scale.md").read_text(encoding="utf-8"))
    (call,) = (call for call in calls if {"--model", "demo"} <= {*call.arguments})
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(picture(number))
    monkeypatch.chdir(tmp_path)
    command = *call.arguments, "--tensor-parallel-size"
    status, stderr = run(batch_ray, *command, 5)
    assert (status, stderr.splitlines()[-1]) == (2, "error: no machine of the cluster has 5 CPUs")
    status, stderr = run(batch_ray, *command, 2)
    assert (status, "captions.parquet is complete: 2 answers, 0 errors" in stderr) == (0, True)
    assert "tensor_parallel_size 2" in stderr
    alone = tmp_path / "alone.jsonl"
    asked = "--prompt", call.arguments[call.arguments.index("--prompt") + 1], "--max-tokens", 512
    assert generated("demo", "pictures", alone, *asked)[0] == 0
    texts = [record["text"] for record in records(alone)]
    assert pq.read_table(tmp_path / "captions.parquet").column("text").to_pylist() == texts


def test_a_mistake_leaves_nothing_behind(ray, run, inputs, tmp_path):
    """The options can be mended, and the same output given again."""
    arguments = ["--input", inputs["tars"], "--output", tmp_path / "out.jsonl", *NEEDS["tars"]]
    status, stderr = run(batch_ray, "--model", "demo", *arguments)
    assert (status, stderr.splitlines()[-1]) == (
        2,
        "error: no machine of the cluster has a GPU; --num-gpus 0 takes CPUs",
    )
    assert list(tmp_path.iterdir()) == []
