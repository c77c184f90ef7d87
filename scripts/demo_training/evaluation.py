"""Right and wrong by question kind: held-out pictures, and problems in lm-eval's form; ours and transformers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo_training.drawing import draw
from demo_training.heldout import HeldOut, heldout_question
from demo_training.questions import Example, make_example
from demo_training.texts import Problem, prompt_text

HELDOUT_SEED = 20_000
PICTURE_TOKENS, PROBLEM_TOKENS = 48, 320  # longest answers


def heldout_examples(count: int, seed: int = HELDOUT_SEED) -> list[Example]:
    """Single questions about pictures that training never draws, in phrasings that it never uses."""
    return [make_example("heldout", seed, number) for number in range(count)]


def new_heldout(count: int) -> list[HeldOut]:
    """The first questions of the new held-out set (heldout.py); kinds take turns."""
    return [heldout_question(number) for number in range(count)]


def conversation(example: Example) -> list[dict[str, Any]]:
    """The first question of an example as chat messages."""
    content: list[dict[str, Any]] = [{"type": "image", "image": draw(scene)} for scene in example.scenes]
    return [{"role": "user", "content": [*content, {"type": "text", "text": example.questions[0].text}]}]


def new_conversation(asked: HeldOut) -> list[dict[str, Any]]:
    """A question of the new held-out set as chat messages."""
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in asked.pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": asked.question}]}]


def our_answers(llm: Any, conversations: Sequence[list[dict[str, Any]]], max_tokens: int) -> list[str]:
    """Greedy answers of this package's LLM."""
    from qwen3vl_moe.engine import SamplingParams

    outputs = llm.chat(list(conversations), SamplingParams(max_tokens=max_tokens, temperature=0.0))
    return [output.outputs[0].text for output in outputs]


def transformers_answers(path: str | Path, conversations: Sequence[list[dict[str, Any]]], max_tokens: int) -> list[str]:
    """Greedy answers of transformers' own model, tokenizer and image processor, in fp32 on the CPU, one by one."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = Qwen2VLImageProcessorPil.from_pretrained(path)  # the class that needs no torchvision
    placeholder = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    texts = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        pictures = [item["image"] for m in messages if isinstance(m["content"], list) for item in m["content"][:-1]]
        inputs = dict(processor(images=pictures, return_tensors="pt")) if pictures else {}
        before, *after = text.split(placeholder)
        for grid, piece in zip(inputs.get("image_grid_thw", ()), after, strict=True):
            before += placeholder * (int(grid.prod()) // processor.merge_size**2) + piece
        ids = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                max_new_tokens=max_tokens,
                do_sample=False,
                **inputs,
            )
        texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def evaluate(
    answer: Callable[[Sequence[list[dict[str, Any]]], int], list[str]],
    examples: Sequence[Example],
    problems: Sequence[Problem] = (),
    new: Sequence[HeldOut] = (),
) -> tuple[dict[str, Any], list[str]]:
    """Ask everything. ``answer`` gives the answers to conversations, of at most so many tokens.

    Returns:
        ``{"pictures": ..., "new": ..., "training_problems": ...}`` (of what there is), and all answers, in this order.
    """
    texts: list[str] = []
    scores: dict[str, Any] = {}
    if examples:
        texts += answer([conversation(example) for example in examples], PICTURE_TOKENS)
        scores["pictures"] = score_pictures(examples, texts)
    if new:
        answers = answer([new_conversation(asked) for asked in new], PICTURE_TOKENS)
        scores["new"] = score_new(new, answers)
        texts += answers
    if problems:
        solved = answer([problem_conversation(problem) for problem in problems], PROBLEM_TOKENS)
        scores["training_problems"] = score_problems(problems, solved)
        texts += solved
    return scores, texts


def score_pictures(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """``{kind: {"right": n, "of": n}}``, and ``all``; an answer is right if it is the expected text."""
    questions = [example.questions[0] for example in examples]
    return _by_kind([(q.kind, q.answer) for q in questions], answers)


def score_new(new: Sequence[HeldOut], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """The same of the new held-out set."""
    return _by_kind([(asked.kind, asked.answer) for asked in new], answers)


def _by_kind(expected: Sequence[tuple[str, str]], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for (kind, right), answer in zip(expected, answers, strict=True):
        for name in (kind, "all"):
            cell = table.setdefault(name, {"right": 0, "of": 0})
            cell["of"] += 1
            cell["right"] += answer.strip() == right
    return {kind: table[kind] for kind in sorted(table, key=lambda kind: (kind == "all", kind))}


def problem_conversation(problem: Problem) -> list[dict[str, Any]]:
    """Zero-shot, as lm-eval asks with the chat template."""
    return [{"role": "user", "content": prompt_text(problem.question)}]


def score_problems(problems: Sequence[Problem], answers: Sequence[str]) -> dict[str, int]:
    """Right by what follows ``####``, and by the last number."""
    right = [problem.answer.split("####")[-1].strip().replace(",", "") for problem in problems]
    return {
        "strict": sum(strict_answer(text) == answer for text, answer in zip(answers, right, strict=True)),
        "flexible": sum(last_number(text) == answer for text, answer in zip(answers, right, strict=True)),
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
