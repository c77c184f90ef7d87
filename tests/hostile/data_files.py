"""Files that the programs of eval/ read: problems, and the cache of answers."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator

from tests.hostile.mutations import RAW_TEXTS, file_mutations, json_mutations

PROBLEM = {"question": "1 + 1?", "answer": "Two.\n#### 2"}


def problems() -> Iterator[tuple[str, bytes]]:
    """Contents of a test.jsonl."""
    rng = random.Random(5)
    sound = json.dumps(PROBLEM).encode()
    for change, line in json_mutations(PROBLEM, rng, 30):
        yield change, sound + b"\n" + line + b"\n"
    yield from file_mutations(sound * 2, rng, 6, 12)
    for name, text in RAW_TEXTS.items():
        yield f"raw: {name}", text
    yield "digits without end", json.dumps({"question": "a", "answer": "#### " + "9" * 1_000_000}).encode()
    yield "commas without end", json.dumps({"question": "a", "answer": "#### " + "9," * 500_000 + "x"}).encode()


class Command:
    def __reduce__(self) -> tuple:
        return print, ("a pickle has been run",)


def caches(sound: bytes) -> Iterator[tuple[str, bytes]]:
    """Contents of a cache's file; ``sound`` is one that this package wrote."""
    rng = random.Random(6)
    yield "as it was written", sound
    yield "a pickle", pickle.dumps(Command())
    yield from file_mutations(sound, rng, 10, 20)
    for name, text in RAW_TEXTS.items():
        yield f"raw: {name}", text
