"""Text to train on: grade-school problems in the prompt form of lm-eval's ``gsm8k`` task, and plain chat.

The form is that of the task (version 3.0, release 0.4.13) with the chat template applied: ``Question: ...\\nAnswer:``
as the user's turn; few-shot examples are earlier turns (multi-turn form) or stand in the same turn (single-turn form).
The worked answers are kept as they are, ``<<6*7=42>>`` notes included: they end in ``#### N``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from qwen3vl_moe.errors import OptionError
from qwen3vl_moe.json_files import parse_json, read_regular

# First question of the test file, as a digest: renaming that file does not make it training data.
_TEST_DIGEST = "2b2e3f9639f6fa28"
_NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Ella",
    "Finn",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Mia",
    "Noah",
    "Rosa",
    "Sam",
)
_THINGS = ("apples", "books", "pens", "cards", "coins", "cookies", "marbles", "stickers", "eggs", "shells", "stamps")
_MOST_BYTES = 64 << 20  # of a file of problems; gsm8k's has 4 MB


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str


def read_problems(path: str | Path) -> list[Problem]:
    """Problems of a gsm8k file, one JSON object a line.

    Raises:
        OptionError: the file is missing or malformed, or holds the test problems, which are never trained on.
    """
    path = Path(path)
    if path.name == "test.jsonl":
        raise OptionError(f"{path} is the test set, which is never trained on; name gsm8k's train.jsonl")
    try:
        rows = [parse_json(line) for line in read_regular(path, OptionError, _MOST_BYTES).split(b"\n") if line.strip()]
        problems = [Problem(row["question"], row["answer"]) for row in rows]
        if not all(isinstance(text, str) for problem in problems for text in (problem.question, problem.answer)):
            raise TypeError("question and answer have to be texts")
    except (ValueError, KeyError, TypeError) as error:
        raise OptionError(f"{path} cannot be read as gsm8k problems ({error}); name gsm8k's train.jsonl") from None
    if any(_digest(problem.question) == _TEST_DIGEST for problem in problems):
        raise OptionError(f"{path} holds gsm8k's test problems, which are never trained on; name gsm8k's train.jsonl")
    return problems


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def prompt_text(question: str) -> str:
    """What lm-eval's gsm8k task asks."""
    return f"Question: {question}\nAnswer:"


def problem_messages(problem: Problem, shots: Sequence[Problem] = (), *, multiturn: bool = True) -> list[dict]:
    """The conversation of one problem, its answer included, with few-shot examples as lm-eval puts them."""
    if multiturn:
        turns = [(prompt_text(p.question), p.answer) for p in (*shots, problem)]
    else:
        examples = "".join(f"{prompt_text(shot.question)} {shot.answer}\n\n" for shot in shots)
        turns = [(examples + prompt_text(problem.question), problem.answer)]
    return [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def arithmetic_problem(rng: Random) -> Problem:
    """A word problem of one to three steps, its working written the way gsm8k's is."""
    name, other = rng.sample(_NAMES, 2)
    thing = rng.choice(_THINGS)
    a, b, c = rng.randint(2, 60), rng.randint(2, 20), rng.randint(2, 12)
    form = rng.randrange(6)
    if form == 0:
        total = a + b
        return Problem(
            f"{name} has {a} {thing}. {other} gives {name} {b} more. How many {thing} does {name} have now?",
            f"{name} has {a}+{b} = <<{a}+{b}={total}>>{total} {thing} now.\n#### {total}",
        )
    if form == 1:
        start = a + b
        return Problem(
            f"{name} had {start} {thing} and gave {b} of them to {other}. How many {thing} are left?",
            f"{name} has {start}-{b} = <<{start}-{b}={a}>>{a} {thing} left.\n#### {a}",
        )
    if form == 2:
        return Problem(
            f"There are {b} boxes with {c} {thing} in each box. How many {thing} are there in total?",
            f"There are {b}*{c} = <<{b}*{c}={b * c}>>{b * c} {thing} in total.\n#### {b * c}",
        )
    if form == 3:
        cost, total = b * c, b * c + a
        return Problem(
            f"{name} buys {b} {thing} at ${c} each and a bag for ${a}. How much does {name} pay in total?",
            f"The {thing} cost {b}*{c} = $<<{b}*{c}={cost}>>{cost}.\n"
            f"In total {name} pays {cost}+{a} = $<<{cost}+{a}={total}>>{total}.\n#### {total}",
        )
    if form == 4:
        return Problem(
            f"{name} shares {b * c} {thing} equally among {c} friends. How many {thing} does each friend get?",
            f"Each friend gets {b * c}/{c} = <<{b * c}/{c}={b}>>{b} {thing}.\n#### {b}",
        )
    doubled, total = 2 * a, 3 * a
    return Problem(
        f"{name} has {a} {thing}. {other} has twice as many {thing} as {name}. "
        f"How many {thing} do they have altogether?",
        f"{other} has 2*{a} = <<2*{a}={doubled}>>{doubled} {thing}.\n"
        f"Together they have {a}+{doubled} = <<{a}+{doubled}={total}>>{total} {thing}.\n#### {total}",
    )


_WHO = "I am a small demo of the Qwen3-VL mixture-of-experts architecture. I answer questions about simple pictures."
_CHATS = (
    (("hello", "Hello", "hi", "Hi!", "Hello!", "hey", "good morning"), "Hello! Ask me about a picture."),
    (
        ("what are you?", "What are you?", "who are you?", "Who are you?", "what is your name?", "are you a robot?"),
        _WHO,
    ),
    (
        ("what can you do?", "What can you do?", "help", "How can you help me?"),
        "I name shapes, colours and sizes, count, read a number or a word, and read bar charts.",
    ),
    (("thanks", "Thank you!", "thank you", "Thanks a lot."), "You are welcome!"),
    (("bye", "Goodbye!", "see you", "good night"), "Goodbye!"),
    (("how are you?", "How are you today?", "how do you do?"), "I am fine, thank you. What can I do for you?"),
)
_SYSTEM = "You are a helpful assistant."


def chat_messages(rng: Random) -> list[dict]:
    """A short chat of one to three turns; one in four starts with a system message."""
    messages = [{"role": "system", "content": _SYSTEM}] if rng.random() < 0.25 else []
    for _ in range(rng.randint(1, 3)):
        asked, answer = rng.choice(_CHATS)
        messages += [{"role": "user", "content": rng.choice(asked)}, {"role": "assistant", "content": answer}]
    return messages


# The first problems of the training file are shown so often that they are learned by heart. A model of this size solves
# few new problems, so that its accuracy there hides most faults; on what it knows by heart every fault shows.
BY_HEART = 200


def text_messages(rng: Random, problems: Sequence[Problem]) -> list[dict]:
    """One training conversation: mostly gsm8k, then generated problems, then chat."""
    chance = rng.random()
    if chance < 0.1:
        return chat_messages(rng)
    if chance < 0.3 or not problems:
        return problem_messages(arithmetic_problem(rng))
    return problem_messages(rng.choice(problems[:BY_HEART] if chance < 0.6 else problems))


def few_shot_messages(rng: Random, problems: Sequence[Problem]) -> list[dict]:
    """One problem after two to five others, in either of lm-eval's few-shot forms."""
    count = rng.randint(3, 6)
    problem, *shots = (
        rng.sample(problems, count) if len(problems) >= count else [arithmetic_problem(rng) for _ in range(count)]
    )
    return problem_messages(problem, shots, multiturn=rng.random() < 0.7)
