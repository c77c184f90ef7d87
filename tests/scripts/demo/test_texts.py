"""Word problems: lm-eval's prompt form, right worked answers, and no test problem ever."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from random import Random

import pytest
import yaml

from demo_training.evaluation import last_number, strict_answer
from demo_training.texts import (
    Problem,
    arithmetic_problem,
    chat_messages,
    few_shot_messages,
    problem_messages,
    prompt_text,
    read_problems,
)
from qwen3vl_moe.errors import OptionError

PROBLEMS = [Problem(f"What is {n} plus 1?", f"It is {n}+1 = {n + 1}.\n#### {n + 1}") for n in range(8)]


@pytest.mark.parametrize("multiturn", [True, False])
@pytest.mark.parametrize("shots", [0, 3])
def test_conversations_are_what_lm_eval_asks(tmp_path, monkeypatch, shots, multiturn):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.task import ConfigurableTask

    rows = "\n".join(json.dumps(vars(problem)) for problem in PROBLEMS)
    (tmp_path / "problems.jsonl").write_text(rows + "\n")
    published = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    config = yaml.safe_load(published.read_text())
    files = {"train": str(tmp_path / "problems.jsonl"), "test": str(tmp_path / "problems.jsonl")}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    task = ConfigurableTask(config={**config, **local, "num_fewshot": shots, "fewshot_config": {"sampler": "first_n"}})

    rendered = []
    task.fewshot_context(
        vars(PROBLEMS[5]) | {},
        num_fewshot=shots,
        apply_chat_template=True,
        fewshot_as_multiturn=multiturn,
        chat_template=lambda messages, **_: rendered.append(messages) or "",
    )
    ours = problem_messages(PROBLEMS[5], PROBLEMS[:shots], multiturn=multiturn)
    assert [dict(message) for message in rendered[-1]] == ours[:-1]


def test_the_test_set_is_refused_by_name(tmp_path):
    with pytest.raises(OptionError, match="test set"):
        read_problems(tmp_path / "test.jsonl")


def test_the_test_set_is_refused_by_content(tmp_path, shared_dir):
    test = shared_dir / "gsm8k" / "test.jsonl"
    if not test.exists():
        pytest.skip("the optional folder of public files holds no gsm8k")
    shutil.copy(test, tmp_path / "train.jsonl")
    with pytest.raises(OptionError, match="test problems"):
        read_problems(tmp_path / "train.jsonl")


def test_a_missing_or_malformed_file_is_one_clear_line(tmp_path):
    with pytest.raises(OptionError, match=r"train\.jsonl cannot be read"):
        read_problems(tmp_path / "train.jsonl")
    for line, text in (
        ('{"question": "?"}', "answer"),
        ('{"question": 3, "answer": "4"}', "have to be texts"),
        ('{"question": "?", "question": "!", "answer": "4"}', "stands twice"),
        ("[" * 100_000, "nested deeper"),
        ("[]", "list indices"),
    ):
        (tmp_path / "train.jsonl").write_text(f"{line}\n")
        with pytest.raises(OptionError, match=rf"train\.jsonl cannot be read as gsm8k problems \(.*{text}"):
            read_problems(tmp_path / "train.jsonl")


def test_generated_problems_are_worked_out_right():
    for number in range(300):
        problem = arithmetic_problem(Random(number))
        steps = re.findall(r"<<(\d+)([-+*/])(\d+)=(\d+)>>", problem.answer)
        assert steps
        for left, sign, right, result in steps:
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)
        assert strict_answer(problem.answer) == last_number(problem.answer) == steps[-1][3]
        given = {int(n) for n in re.findall(r"\d+", problem.question)} | {2}
        results = {int(step[3]) for step in steps}
        assert all({int(left), int(right)} <= given | results for left, _, right, _ in steps)


def test_chats_and_few_shot_conversations_take_turns():
    for number in range(50):
        for messages in (chat_messages(Random(number)), few_shot_messages(Random(number), PROBLEMS)):
            roles = [message["role"] for message in messages if message["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert prompt_text("Why?") == "Question: Why?\nAnswer:"


def test_answers_are_found_as_the_task_filters_find_them():
    text = "So 3*4 = 12.\n#### 1,200"
    assert (strict_answer(text), last_number(text)) == ("1200", "1200")
    assert (strict_answer("about 7."), last_number("about 7 or $8.")) == (None, "8")
