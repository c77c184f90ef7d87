"""eval/lm.py as a program: lm-eval's own command, its cache, and its errors in one line."""

import json
import sys
from functools import partialmethod

import pytest
from lm_eval.tasks import TaskManager

import command
from lm import EngineLM
from qwen3vl_moe.errors import UserError
from tests.eval.conftest import instance


@pytest.fixture
def task(tmp_path, problems_dir, monkeypatch):
    """The file of a task of somebody's own, which needs no network."""
    content = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(problems_dir / "test.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": 0,
    }
    path = tmp_path / "tiny_choice.yaml"
    path.write_text(json.dumps(content))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # lm-eval reads the files of its thousands of tasks first, which takes as long as the rest of these tests.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    return path


@pytest.fixture
def run(monkeypatch):
    def call(*arguments, model="qwen3vl_moe", model_args="pretrained=demo,dtype=float32"):
        fixed = ["lm-eval", "run", "--model", model, "--model_args", model_args, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*fixed, *map(str, arguments)])
        command.main()

    return call


def test_lm_evals_command(run, task, tmp_path, capsys):
    out = tmp_path / "out"
    run("--tasks", task, "--apply_chat_template", "--output_path", out, "--log_samples", "--trust_remote_code")
    assert "tiny_choice" in capsys.readouterr().out
    (samples,) = out.rglob("samples_tiny_choice_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 3
    model = EngineLM("demo", dtype="float32", device="cpu", progress=False)
    for row in rows:
        arguments = [tuple(each.values()) for each in row["arguments"].values()]
        assert arguments[0][0].startswith("<|im_start|>user")
        scores = model.loglikelihood([instance(*each) for each in arguments])
        assert [float(each[0][0]) for each in row["resps"]] == pytest.approx([score for score, _ in scores])
    (results,) = out.rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["qwen3vl_moe"]["dtype"] == "float32"
    assert config["contexts_cut"] == 0


def test_what_was_cut_is_in_the_results(run, task, tmp_path):
    cut = "pretrained=demo,dtype=float32,max_length=16"
    run("--tasks", task, "--output_path", tmp_path / "out", model_args=cut)
    (results,) = (tmp_path / "out").rglob("results_*.json")
    config = json.loads(results.read_text())["config"]
    assert config["qwen3vl_moe"]["max_model_len"] == 16
    assert config["contexts_cut"] == 6  # two choices for each of three questions


def test_the_commands_cache_is_no_pickle(run, task, tmp_path, monkeypatch):
    run("--tasks", task, "--use_cache", tmp_path / "kept")
    (file,) = tmp_path.glob("kept*")
    assert len([json.loads(line) for line in file.read_text().splitlines()]) == 6
    monkeypatch.setattr(EngineLM, "_score", None)  # nothing is left to compute
    run("--tasks", task, "--use_cache", tmp_path / "kept")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("--tasks", "no_such_task"), {}, "no_such_task"),
        (("--tasks", "nowhere.yaml"), {}, "nowhere.yaml"),
        ((), {"model": "qwen9"}, "qwen9"),
        ((), {"model_args": "pretrained"}, "expected `key=value`"),
        ((), {"model_args": "pretrained=nowhere"}, "nowhere is neither a directory nor a hub id"),
        (
            (),
            {"model_args": "pretrained=demo,tokenizer=gpt2"},
            "tokenizer='gpt2' is not supported: ",
        ),
        ((), {"model_args": "pretrained=demo,beams=3"}, "unknown option 'beams'"),
        ((), {"model_args": "pretrained=demo,max_length=8,max_model_len=9"}, "max_length=8 and max_model_len=9"),
        (("--use_cache", "/dev/null/cache"), {}, "/dev/null"),
        (("--limit", "2", "--samples", '{"a": [1]}'), {}, "--limit"),
        (("--config", "nowhere.yml"), {}, "nowhere.yml"),
        (("--metadata", "nothing"), {}, "nothing"),
    ],
)
def test_errors_of_use_are_one_line(run, task, capsys, arguments, options, message):
    given = arguments if "--tasks" in arguments else ("--tasks", task, *arguments)
    with pytest.raises(SystemExit) as caught:
        run(*given, **options)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
    assert "error: " in last


def test_missing_data_are_one_line(run, tmp_path, capsys, monkeypatch):
    def unreachable(*arguments, **named):
        raise ConnectionError("Couldn't reach 'someone/tasks' on the Hub\nand more of it")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    path = tmp_path / "far_away.yaml"
    path.write_text(json.dumps({"task": "far_away", "dataset_path": "someone/tasks", "test_split": "test"}))
    with pytest.raises(SystemExit) as caught:
        run("--tasks", path)
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the data of a task cannot be had (Couldn't reach 'someone/tasks' on the Hub): it ")


def test_ours_are_one_line(monkeypatch, capsys):
    def fail():
        raise UserError("no such checkpoint")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no such checkpoint\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def fail():
        raise ValueError("somebody's mistake")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", fail)
    with pytest.raises(ValueError, match="somebody's mistake"):
        command.main()


def test_an_interrupt_is_no_traceback(monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", interrupt)
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 130
