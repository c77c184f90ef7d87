"""Right and wrong by question kind: held-out pictures, and problems in lm-eval's form, through this package's LLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from demo_training.drawing import draw
from demo_training.questions import Example, make_example
from demo_training.texts import Problem, prompt_text

HELDOUT_SEED = 20_000


def heldout_examples(count: int, seed: int = HELDOUT_SEED) -> list[Example]:
    """Single questions about pictures that training never draws, in phrasings that it never uses."""
    return [make_example("heldout", seed, number) for number in range(count)]


def conversation(example: Example) -> list[dict[str, Any]]:
    """The first question of an example as chat messages."""
    content: list[dict[str, Any]] = [{"type": "image", "image": draw(scene)} for scene in example.scenes]
    return [{"role": "user", "content": [*content, {"type": "text", "text": example.questions[0].text}]}]


def score_pictures(llm: Any, examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """``{kind: {"right": n, "of": n}}``, and ``all``; an answer is right if it is the expected text."""
    from qwen3vl_moe.engine import SamplingParams

    outputs = llm.chat([conversation(example) for example in examples], SamplingParams(max_tokens=48, temperature=0.0))
    table: dict[str, dict[str, int]] = {}
    for example, output in zip(examples, outputs, strict=True):
        question = example.questions[0]
        for kind in (question.kind, "all"):
            cell = table.setdefault(kind, {"right": 0, "of": 0})
            cell["of"] += 1
            cell["right"] += output.outputs[0].text.strip() == question.answer
    return {kind: table[kind] for kind in sorted(table, key=lambda kind: (kind == "all", kind))}


def score_problems(llm: Any, problems: Sequence[Problem], *, max_tokens: int = 320) -> dict[str, int]:
    """Zero-shot with the chat template; right by what follows ``####``, and by the last number."""
    from qwen3vl_moe.engine import SamplingParams

    prompts = [[{"role": "user", "content": prompt_text(problem.question)}] for problem in problems]
    outputs = llm.chat(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0))
    texts = [output.outputs[0].text for output in outputs]
    answers = [problem.answer.split("####")[-1].strip().replace(",", "") for problem in problems]
    return {
        "strict": sum(strict_answer(text) == answer for text, answer in zip(texts, answers, strict=True)),
        "flexible": sum(last_number(text) == answer for text, answer in zip(texts, answers, strict=True)),
        "of": len(problems),
    }


def strict_answer(text: str) -> str | None:
    """The number after ``####``, as the task's strict filter finds it."""
    found = re.search(r"#### (-?[0-9.,]+)", text)
    return found[1].replace(",", "").rstrip(".") if found else None


def last_number(text: str) -> str | None:
    """The last number, as the task's flexible filter finds it."""
    found = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return found[-1].replace(",", "").replace("$", "").rstrip(".") if found else None
