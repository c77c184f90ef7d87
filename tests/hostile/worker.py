"""A process that runs cases of the corpus, one line of JSON on standard output for each number on standard input.

``python -m tests.hostile.worker``, with PYTHONPATH=.:kernels:scripts:eval as pytest sets it. With the argument
``planted`` it has a few faults instead, to see whether whoever watches finds them.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import batch_file
import problems
from answer_cache import AnswerCache
from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.inputs.processor import Processor
from tests.hostile import calls, checkpoints, data_files, image_bytes, request_lines, sources

MEMORY = 6 << 30  # beyond what a worker takes at rest: a case that wants more fails alone
MAX_LINE = 1000  # characters of an error
SHORT = SamplingParams(max_tokens=1)
FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pickle.find_class")


class Forbidden(BaseException):
    """Input has started a program, or named what a pickle should run."""


def forbid(event: str, arguments: tuple) -> None:
    if event in FORBIDDEN:
        raise Forbidden(f"{event} {arguments!r:.200}")


def raises() -> None:
    raise KeyError("what nobody catches")


def runs_a_program() -> None:
    os.system("true")


def hangs() -> None:
    while True:
        pass


def takes_memory() -> None:
    bytearray(520 << 20)


def dies() -> None:
    os._exit(3)


PLANTED = (raises, runs_a_program, hangs, takes_memory, dies)  # what whoever watches has to find


class Doors:
    """Every way in, with what comes through it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sound = folder / "sound"
        self.sound.mkdir()
        checkpoints.write_sound(self.sound)
        self.llm = self.load(self.sound)
        self.file = folder / "file"
        self.cache = folder / "cache.db"
        with AnswerCache(self.cache) as cache:
            cache["a"], cache["b"] = "an answer", (-1.5, True)

    def load(self, path: Path) -> LLM:
        return LLM(path, device="cpu", progress=False, num_blocks=64, max_num_seqs=2)

    def all(self) -> Iterator[tuple[str, str, Callable[[], Any]]]:
        """Door, name of the case, and what runs it."""
        (self.folder / "images").mkdir()
        sound = checkpoints.cases(self.sound)
        for door, cases, run in (
            ("line", request_lines.cases(), self.line),
            ("image", image_bytes.cases(), self.image),
            ("source", sources.cases(self.folder / "images"), self.image),
            ("prompt", calls.prompts(), self.prompt),
            ("conversation", calls.conversations(), self.conversation),
            ("sampling", calls.sampling(), self.sampling),
            ("template", calls.templates(), self.template),
            ("checkpoint", sound, self.checkpoint),
            ("problems", data_files.problems(), self.problems),
            ("cache", data_files.caches(self.cache.read_bytes()), self.answer_cache),
        ):
            for name, case in cases:
                yield door, name, partial(run, case)

    def line(self, content: bytes) -> None:
        self.file.write_bytes(content)
        for request in batch_file.read_requests(self.file, SHORT, {}):
            if request.conversation is None:
                raise UserError(request.error)
            ((_, result),) = self.llm.as_completed([request.conversation], [request.params], return_exceptions=True)
            if isinstance(result, Exception):
                raise result

    def image(self, source: Any) -> None:
        self.llm.chat([{"role": "user", "content": [{"type": "image", "image": source}]}], SHORT)

    def prompt(self, prompt: Any) -> None:
        self.llm.generate(prompt, SHORT)

    def conversation(self, conversation: Any) -> None:
        self.llm.chat(conversation, SHORT)

    def sampling(self, given: dict[str, Any]) -> None:
        if not given.keys() <= SamplingParams.__dataclass_fields__.keys():
            return  # Python's own TypeError, as of any call
        self.llm.generate([70, 71, 72], SamplingParams(**{"max_tokens": 1, **given}))

    def template(self, template: str) -> None:
        change = "chat_template.jinja", template.encode("utf-8", "surrogatepass")
        folder = checkpoints.damaged(self.sound, self.folder / "damaged", change)
        processor = Processor.from_pretrained(folder, Qwen3VLMoeConfig.from_pretrained(folder), max_model_len=1024)
        processor.chat([{"role": "user", "content": "How many?"}])

    def checkpoint(self, change: tuple[str, bytes]) -> None:
        llm = self.load(checkpoints.damaged(self.sound, self.folder / "damaged", change))
        content = [{"type": "image", "image": request_lines.PIXEL}, {"type": "text", "text": "How many?"}]
        llm.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=2))

    def problems(self, content: bytes) -> None:
        self.file.write_bytes(content)
        problems.read_problems(self.file)

    def answer_cache(self, content: bytes) -> None:
        self.file.write_bytes(content)
        with AnswerCache(self.file) as cache:
            for key in ("a", "b", "c"):
                if key in cache:
                    cache[key]
            cache["d"] = "another"


def outcome_of(run: Callable[[], Any]) -> tuple[str, bool]:
    """What is wrong with how a case ended, nothing if it was used or refused in a line; and whether it was used."""
    try:
        run()
    except UserError as error:
        text = str(error)
        if not text.isprintable():
            return f"the error is no printable line: {text[:300]!a}", False
        return f"the error has {len(text)} characters: {text[:200]!a}" if len(text) > MAX_LINE else "", False
    except BaseException as error:
        try:
            text = str(error)
        except Exception:
            text = ""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/hostile/" not in f.filename][-3:]
        where = " > ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)
        return f"{type(error).__name__} at {where}: {text[:200]!a}", False
    return "", True


def peak_kilobytes() -> int:
    """The most memory that this process has held so far; getrusage would begin with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def main() -> None:
    # What the library prints goes elsewhere: standard output belongs to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        planted = [("planted", fault.__name__, fault) for fault in PLANTED]
        cases = planted if "planted" in sys.argv else list(Doors(Path(folder)).all())
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        sys.addaudithook(forbid)
        print(json.dumps([(door, name) for door, name, _ in cases]), file=answers, flush=True)
        for line in sys.stdin:
            before = peak_kilobytes()
            wrong, used = outcome_of(cases[int(line)][2])
            grown = (peak_kilobytes() - before) >> 10
            print(json.dumps([wrong, used, grown]), file=answers, flush=True)


if __name__ == "__main__":
    main()
