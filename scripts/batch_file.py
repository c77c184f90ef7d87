"""Many requests in a file, and their answers in another: a job that can be killed at any moment and taken up again.

Both files are JSON lines, UTF-8. A request, where "prompt" or "messages" is needed and the rest is optional::

    {"id": "a", "prompt": "What is this?", "image": "cat.jpg", "max_tokens": 50}
    {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, ...]}], "seed": 1}

``prompt`` is what a user says, as in a chat; ``image`` (or ``images``, a list) stands before it: paths, from the folder
of the requests file if they are relative, or URLs. Paths in ``messages`` count from there too. ``id`` is a text or a
number, unique in the file. Any other key is one of ``SAMPLING_KEYS`` and replaces that sampling option for its line.

An answer, or what is wrong with the request::

    {"index": 0, "id": "a", "request": "7d1c...", "text": "...", "finish_reason": "stop",
     "prompt_tokens": 90, "image_tokens": 64, "answer_tokens": 12}
    {"index": 1, "id": null, "request": "03fa...", "error": "image 0 ('cat.jpg'): there is no such file"}

``index`` counts the requests from 0 (empty lines do not count). ``request`` is a fingerprint of the request's line and
of the options that its answer depends on; it ties an answer to its request. Answers are appended as they finish, and
put in order when the last is there. The file itself says what is left to do: nothing else is kept, and a record that is
deleted from it is asked for again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3vl_moe.engine.outputs import RequestOutput
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import PromptError, UserError

SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams) if f.name not in ("logprobs", "prompt_logprobs"))
_OTHER_KEYS = ("id", "prompt", "messages", "image", "images")
_RECORD_START = b'{"index": '


@dataclass(frozen=True)
class FileRequest:
    """One line of the requests file.

    Attributes:
        index: its number among the requests, from 0.
        id: as given, None without one.
        fingerprint: of the line and of what else its answer depends on.
        conversation: messages for ``LLM.chat``; None if ``error`` says why there are none.
        params: its sampling parameters.
        error: what is wrong with the line, else None.
    """

    index: int
    id: str | int | None
    fingerprint: str
    conversation: list[dict] | None
    params: SamplingParams
    error: str | None = None


def read_requests(path: Path, defaults: SamplingParams, settings: Mapping[str, Any]) -> list[FileRequest]:
    """The requests in a file. One that cannot be used says so in ``error``.

    Args:
        path: the requests file.
        defaults: sampling parameters of lines that do not set them.
        settings: whatever else the answers depend on (the model, the size of images), as JSON values.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    common = json.dumps([dict(settings), [str(getattr(defaults, f.name)) for f in fields(defaults)]]).encode()
    requests: list[FileRequest] = []
    first_with: dict[str | int, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fingerprint = hashlib.sha256(common + b"\n" + line.strip()).hexdigest()[:16]
        name = conversation = error = None
        params = defaults
        try:
            content = _parse(line)
            name = _id(content)
            if name is not None and first_with.setdefault(name, number) != number:
                raise PromptError(f"the id {name!r} is that of line {first_with[name]} too; ids are unique")
            conversation = _conversation(content, path.parent)
            # null is "not said", as in the OpenAI form: it leaves the default, and lifts no limit.
            said = {key: content[key] for key in SAMPLING_KEYS if content.get(key) is not None}
            params = replace(defaults, **said)
        except UserError as problem:
            conversation, error = None, f"line {number}: {problem}"
        requests.append(FileRequest(len(requests), name, fingerprint, conversation, params, error))
    return requests


class AnswerFile:
    """The answers to ``requests``: those that are there already, and those that :meth:`write` adds.

    Use it as a context manager. While it is open, nobody else can open it for the same job.

    Attributes:
        done: index of every request that has its record, error records included.
        num_errors: how many of them are error records.
        repaired: whether the last line had been written in part only, and was dropped.

    Raises:
        UserError: the file holds something else than answers to these requests (it is left as it is then), another
            process writes to it, or it cannot be written.
    """

    def __init__(self, path: Path, requests: list[FileRequest], source: Path):
        self.path, self.requests, self._source = path, requests, source
        self.done: set[int] = set()
        self.num_errors, self.repaired = 0, False
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file, so it cannot be taken up again; give another --output")
        try:
            # No buffer: a record that could not be written must not be tried again when the file is closed.
            self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  closed by __exit__
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        try:
            self._lock()
            self._take_stock()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def todo(self) -> list[FileRequest]:
        """Requests without a record, in order."""
        return [request for request in self.requests if request.index not in self.done]

    def write(self, request: FileRequest, result: RequestOutput | Exception | str) -> None:
        """Append the record of one request: its answer, or the error in its place. It survives the process.

        Raises:
            UserError: the file cannot be written.
        """
        record = {"index": request.index, "id": request.id, "request": request.fingerprint}
        if isinstance(result, RequestOutput):
            answer = result.outputs[0]
            record |= {
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(result.prompt_token_ids),
                "image_tokens": result.num_image_tokens,
                "answer_tokens": len(answer.token_ids),
            }
        else:
            record["error"] = str(result)
        # An id may hold half of a surrogate pair, which UTF-8 cannot say and JSON writes as \udXXX.
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        self._count(record)

    def sort(self) -> None:
        """Put the records of a complete job in the order of the requests; at once, or not at all."""
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        ordered = sorted(lines, key=lambda line: json.loads(line)["index"])
        if ordered == lines:
            return
        target = self.path.resolve()  # a link stays a link
        part = target.with_name(target.name + ".part")
        try:
            with open(part, "wb") as file:
                file.writelines(ordered)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"{self.path} cannot be put in order: {error.strerror}") from None

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lifts it when this process ends
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being written by another run; wait for it, or give another --output"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; the job itself does not need one

    def _take_stock(self) -> None:
        self._file.seek(0)
        whole, newline, rest = self._file.read().rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if newline else [], start=1):
            self._check(number, line)
        if rest:
            # A record is one write; only its end can be missing. Anything else was not written here.
            if not (rest.startswith(_RECORD_START) or _RECORD_START.startswith(rest)):
                raise UserError(f"{self.path}: its last line is no answer; give another --output")
            self._file.truncate(len(whole) + len(newline))
            self.repaired = True

    def _check(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
            index, fingerprint = record["index"], record["request"]
            if type(index) is not int or not ("error" in record or "text" in record):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{where} is no answer; give another --output") from None
        if not 0 <= index < len(self.requests) or self.requests[index].fingerprint != fingerprint:
            raise UserError(
                f"{where} answers another request than {self._source} has there (index {index}), or was made with "
                "another model, or other sampling or image options: go on with the same ones, or give another --output"
            )
        if index in self.done:
            raise UserError(f"{where} repeats the answer to request {index}; delete one of the two")
        self._count(record)

    def _count(self, record: Mapping[str, Any]) -> None:
        self.done.add(record["index"])
        self.num_errors += "error" in record


def _parse(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise PromptError(f"no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise PromptError(f"no JSON ({error.msg} at character {error.pos})") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets within brackets
        raise PromptError(f"no JSON ({error})") from None
    if not isinstance(content, dict):
        raise PromptError(f"a JSON object is needed, got {type(content).__name__}")
    unknown = sorted(content.keys() - {*_OTHER_KEYS, *SAMPLING_KEYS})
    if unknown:
        raise PromptError(f"the key {unknown[0]!r} is unknown; known are {', '.join((*_OTHER_KEYS, *SAMPLING_KEYS))}")
    return content


def _id(content: dict[str, Any]) -> str | int | None:
    name = content.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise PromptError(f"the id is of type {type(name).__name__}; a text or an integer is needed")
    return name


def _conversation(content: dict[str, Any], folder: Path) -> list[dict]:
    given = [key for key in ("prompt", "messages") if key in content]
    if len(given) != 1:
        raise PromptError(f"{' and '.join(given) or 'nothing'} given; one of prompt, messages is needed")
    images = [content["image"]] if "image" in content else content.get("images", [])
    if "image" in content and "images" in content:
        raise PromptError("image and images given; one of them is enough")
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise PromptError("image is a path or a URL, and images a list of them")
    if "messages" in content:
        if images:
            raise PromptError("image goes with prompt; in messages, images are items of the content")
        messages = content["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise PromptError("messages is a list of objects with role and content")
        lacking = next((number for number, message in enumerate(messages) if "role" not in message), None)
        if lacking is not None:
            raise PromptError(f"messages[{lacking}] has no role")
        return _located(messages, folder)
    if not isinstance(content["prompt"], str):
        raise PromptError(f"prompt is of type {type(content['prompt']).__name__}; a text is needed")
    items = [{"type": "image", "image": _locate(image, folder)} for image in images]
    return [{"role": "user", "content": [*items, {"type": "text", "text": content["prompt"]}]}]


def _located(messages: Any, folder: Path) -> Any:
    """Messages with every relative path of an image counted from ``folder``; the processor checks their form."""
    if isinstance(messages, list):
        return [_located(message, folder) for message in messages]
    if not isinstance(messages, dict):
        return messages
    if messages.get("type") in ("image", "image_url"):
        paths = ("image", "path", "url", "image_url")
        return {key: _locate(value, folder) if key in paths else value for key, value in messages.items()}
    return {key: _located(value, folder) if key == "content" else value for key, value in messages.items()}


def _locate(source: Any, folder: Path) -> Any:
    if isinstance(source, dict):  # {"image_url": {"url": ...}}
        return {key: _locate(value, folder) if key == "url" else value for key, value in source.items()}
    if not isinstance(source, str) or not source or "://" in source or source.startswith(("data:", "file:")):
        return source
    return str(folder / source)
