"""How a question of the wide set is put: one phrasing of its patterns, as people type it.

``[a|b|]`` stands for one of its parts, {name} for what is asked about, {any} for a word that is none. No pattern gives
a phrasing of the held-out sets; a test expands them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from random import Random

from demo_training.patterns import PATTERNS
from demo_training.questions import PHRASINGS
from demo_training.words import made_up

OPENINGS = (
    *("",) * 18, "Please answer: ", "Look closely. ", "Tell me: ", "Quick question: ", "I have a question. ", "Hello! ",
    "Next: ", "Now then: ",
)  # fmt: skip
ENDINGS = ("",) * 28 + (" Answer briefly.", " One word, please.", " Thank you.", " Thanks!")
# Said without changing what is asked, and where.
FILLERS = ("really", "exactly", "actually", "then", "now", "please", "perhaps", "clearly", "just now")
UNKNOWN = 0.08  # share of the questions with a word that is none, somewhere
ASKING = frozenset(("Is", "Are", "Does", "Do", "What", "Which", "Where", "Has", "Can"))
ARTICLES = frozenset(("the", "a", "an"))
_HELD_OUT = frozenset(phrasings[-1] for phrasings in PHRASINGS.values())
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expansions(pattern: str) -> Iterator[str]:
    """Every phrasing that a pattern gives."""
    pieces = _CHOICE.split(pattern)
    for chosen in product(*(piece.split("|") if number % 2 else [piece] for number, piece in enumerate(pieces))):
        yield "".join(chosen)


@lru_cache
def phrasings_of(kind: str) -> tuple[tuple[str, ...], ...]:
    """Of each pattern of a kind, what it gives, without the old held-out phrasings."""
    return tuple(tuple(text for text in expansions(pattern) if text not in _HELD_OUT) for pattern in PATTERNS[kind])


def phrase(rng: Random, kind: str, blanks: dict[str, str]) -> str:
    """A question of this kind: some with words that say nothing, without articles, a capital or the last mark."""
    words = rng.choice(rng.choice(phrasings_of(kind))).split(" ")
    if rng.random() < UNKNOWN:
        words.insert(rng.randint(1, len(words) - 1), "{any}")
    text = " ".join(words).format(**blanks, any=made_up(rng))
    text = text[0].upper() + text[1:] if words[0] == "{any}" else text
    for vowel in ("orange", "upper"):
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    words = text.split(" ")
    if words[0] in ASKING and rng.random() < 0.1:
        words.insert(1, rng.choice(FILLERS))
    if rng.random() < 0.06:
        words = [word for word in words if word not in ARTICLES]
    text = rng.choice(OPENINGS) + " ".join(words)
    if rng.random() < 1 / 12:
        return text[0].lower() + text[1:]
    return text[:-1] if rng.random() < 1 / 24 else text + rng.choice(ENDINGS)
