"""Checkpoints that think before they answer, in batches: as the server has them."""

from __future__ import annotations

import shutil

import pytest

from qwen3vl_moe.weights.source import DEMO
from tests.scripts.batches.conftest import records, write_lines
from tests.scripts.batches.test_openai import line

WITH_TAGS = "{# <think> #}"
AT_ONCE = "{{- '<think>\n' -}}"
FORM = {"json": {"enum": ["yes", "no"]}}
THOUGHT = "<think>\nhm{3}\n</think>\n\n(yes|no)"


@pytest.fixture
def thinking(tmp_path):
    """``thinking(ending)``: the demo with a template that ends so."""

    def make(ending):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        for path in DEMO.iterdir():
            (folder / path.name).symlink_to(path)
        template = folder / "chat_template.jinja"
        template.unlink()
        text = (DEMO / template.name).read_text().rstrip()
        assert text.endswith("{%- endif -%}")
        template.write_text(f"{text.removesuffix('{%- endif -%}')}{ending}{{%- endif -%}}")
        return folder

    yield make
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)


def answers_of(generated, model, tmp_path, *bodies):
    """The messages, or the errors, that these bodies are answered with."""
    lines = [line(str(number), **body) for number, body in enumerate(bodies)]
    source, output = write_lines(tmp_path / "batch.jsonl", lines), tmp_path / "answers.jsonl"
    generated(model, source, output, "--served-model-name", "m")
    found = [record["response"]["body"] for record in records(output)]
    return [body["choices"][0]["message"] if "choices" in body else body["error"]["message"] for body in found]


def test_reasoning_comes_apart(generated, thinking, tmp_path):
    thought = {"structured_outputs": {"regex": THOUGHT}, "max_tokens": 40}
    message, plain = answers_of(generated, thinking(WITH_TAGS), tmp_path, thought, {"max_tokens": 3})
    assert message["reasoning_content"] == "hmmm"
    assert message["content"] in ("yes", "no")
    assert "reasoning_content" not in plain
    # The same text is said by a checkpoint whose template knows nothing of reasoning: then it is none.
    (tmp_path / "answers.jsonl").unlink()
    (whole,) = answers_of(generated, "demo", tmp_path, thought)
    assert whole["content"].startswith("<think>\nhmmm\n</think>\n\n")
    assert whole.keys() == {"role", "content"}


def test_a_prompt_may_begin_the_reasoning(generated, thinking, tmp_path):
    form = {"structured_outputs": FORM}
    regex = {"structured_outputs": {"regex": "a"}}
    message, formed, refused = answers_of(generated, thinking(AT_ONCE), tmp_path, {"ignore_eos": True}, form, regex)
    for each in (message, formed):
        assert each["content"] == ""
        assert each["reasoning_content"]  # it never came to an end
    assert "regex does not go with a checkpoint that thinks first" in refused
