"""A cache of answers for lm-eval that cannot run code: JSON lines instead of lm-eval's own file of pickles.

Whoever can write to a file of pickles can run programs as the one who reads it, and a cache is a file that people pass
on with their results. Here an entry is a line, ``{"key": ..., "value": ...}``: the key is lm-eval's hash of the
request, the value a text, a number, or a pair of a log-probability and whether it was the greedy choice.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import lm_eval.api.model

from qwen3vl_moe.errors import UserError


class AnswerCache:
    """A mapping in a file, of which each new entry is appended at once. What an interruption has cut off is dropped.

    Raises:
        UserError: the file is no cache of this form, or cannot be read and written, or another run has it open.
    """

    def __init__(self, path: Path):
        self.path = path
        self._values: dict[str, Any] = {}
        try:
            # Not for waiting: a pipe of this name would be waited for without end.
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            raise UserError(f"cache {str(path)!r} cannot be opened: {getattr(error, 'strerror', error)}") from None
        self._file = os.fdopen(file, "r+b", buffering=0)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise UserError(f"cache {str(path)!r} is no regular file")
            self._lock()
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self._values and self._values[key] == value:
            return  # lm-eval hands in at the end what has been stored as it came
        line = json.dumps({"key": key, "value": value}).encode() + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"cache {str(self.path)!r} cannot be written: {error.strerror}") from None
        self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def commit(self) -> None:
        """Nothing is left to do: what lm-eval calls after each task."""

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"cache {str(self.path)!r} is in use by another run: wait, or name another one") from None
        except OSError:
            pass  # some network file systems have no locks

    def _load(self) -> None:
        whole, newline, rest = self._file.read().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            key, value = self._entry(number, line)
            self._values[key] = value
        if rest:
            if not (rest.startswith(b'{"key": ') or b'{"key": '.startswith(rest)):
                raise self._refusal("its last line")
            self._file.truncate(len(whole) + len(newline))

    def _entry(self, number: int, line: bytes) -> tuple[str, Any]:
        try:
            match json.loads(line):
                case {"key": str(key), "value": str() | int() | float() as value, **rest} if not rest:
                    return key, value
                case {"key": str(key), "value": [int() | float() as score, bool(greedy)], **rest} if not rest:
                    return key, (score, greedy)
        except (ValueError, RecursionError):
            pass
        raise self._refusal(f"line {number}")

    def _refusal(self, where: str) -> UserError:
        return UserError(f"cache {str(self.path)!r} was not written by this program ({where}): name another file")


class CachingLM(lm_eval.api.model.CachingLM):
    """lm-eval's wrapper of a model, over an :class:`AnswerCache`."""

    def __init__(self, lm: Any, cache_db: str):
        self.lm, self.cache_db = lm, cache_db
        path = Path(cache_db).with_suffix(".jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache {str(path)!r} cannot be made: {error.strerror}") from None
        self.dbdict: Any = AnswerCache(path)
        lm.set_cache_hook(self.get_cache_hook())


def install() -> None:
    """From now on lm-eval caches in JSON lines."""
    lm_eval.api.model.CachingLM = CachingLM
