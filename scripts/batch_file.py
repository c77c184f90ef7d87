"""Many requests in a file, to be answered in another (batch_answers.py): what a line may say.

Both files are JSON lines, UTF-8. A request, where "prompt" or "messages" is needed and the rest is optional::

    {"id": "a", "prompt": "What is this?", "image": "cat.jpg", "max_tokens": 50}
    {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "image": "cat.jpg"}, ...]}], "seed": 1}

``prompt`` is what a user says, as in a chat; ``image`` (or ``images``, a list) and ``video`` (or ``videos``) stand
before it: paths, from the folder of the requests file if they are relative, or URLs. Paths in ``messages`` count from
there too. ``id`` is a text or a whole number, unique in the file. Any other key is one of ``SAMPLING_KEYS`` and
replaces that sampling option for its line. A key with the value null is a key that is not there: tables that are
written as lines give every line every key. For their sake 5.0 is taken where an integer is needed, too.

An answer, or what is wrong with the request::

    {"index": 0, "id": "a", "request": "7d1c...", "text": "...", "finish_reason": "stop",
     "answer_tokens": 12, "prompt_tokens": 90, "image_tokens": 64}
    {"index": 1, "id": null, "request": "03fa...", "error": "image 0 ('cat.jpg'): there is no such file"}

``index`` counts the requests from 0 (empty lines do not count). ``request`` is a fingerprint of the request's line and
of the options that its answer depends on; it ties an answer to its request. Answers are appended as they finish, and
put in order when the last is there. Where more than one answer was asked for (``n``), ``choices`` holds them all, and
``text`` is that of the first. The file itself says what is left to do: nothing else is kept, and a record that is
deleted from it is asked for again.

A file whose first line has ``custom_id`` and ``body`` is in OpenAI's batch format, and so are all of its lines, and the
answers to them: batch_openai.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

from batch_openai import chat_request, is_openai_line
from qwen3vl_moe.engine.params import SamplingParams
from qwen3vl_moe.errors import PromptError, UserError, one_line
from qwen3vl_moe.inputs.fetch import is_base64_media
from qwen3vl_moe.json_files import check_regular, parse_json

MAX_FILE_BYTES = 2 << 30  # all requests are held in memory
MAX_LINE_BYTES = 128 << 20  # several images in base64 fit
_NOT_IN_A_FILE = ("logprobs", "prompt_logprobs", "detokenize")  # a record is a text, and has a text
SAMPLING_KEYS = tuple(f.name for f in fields(SamplingParams) if f.name not in _NOT_IN_A_FILE)
_OTHER_KEYS = ("id", "prompt", "messages", "image", "images", "video", "videos")
_PATH_KEYS = ("image", "video", "path", "url", "image_url", "video_url")  # of an item of a message
_URL = re.compile(r"\s*(data:|file:|[a-z][a-z0-9+.-]*://)", re.I)
_INTEGER_KEYS = {f.name for f in fields(SamplingParams) if str(f.type).startswith("int")}
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair
_ID_FIRST = re.compile(rb'\s*\{\s*("id"|"custom_id")\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*"|-?[0-9]{1,40})\s*[,}]')


@dataclass(frozen=True)
class FileRequest:
    """One line of the requests file, or one row of another input (batch_inputs.py).

    Attributes:
        index: its number among the requests of the whole input, from 0.
        id: as given, None without one.
        fingerprint: of the line and of what else its answer depends on.
        conversation: messages for ``LLM.chat``, or a function that reads them (and raises a ``PromptError`` where they
            cannot be used); None if ``error`` says why there are none.
        params: its sampling parameters.
        error: what is wrong with the line, else None.
        row: what the input says of it, by key or column, or a function that reads that; None where nothing can be said.
    """

    index: int
    id: str | int | None
    fingerprint: str
    conversation: list[dict] | Callable[[], list[dict]] | None
    params: SamplingParams
    error: str | None = None
    row: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class LineOptions:
    """How lines are understood.

    Attributes:
        prompt: what is asked in lines that bring neither prompt nor messages; None: such lines are errors.
        keep_input: whether keys that mean nothing here are kept with the answer instead of refused.
        model_names: what ``body.model`` may be in OpenAI's format.
    """

    prompt: str | None = None
    keep_input: bool = False
    model_names: tuple[str, ...] = ()


_PLAIN = LineOptions()


def read_requests(
    path: Path, defaults: SamplingParams, settings: Mapping[str, Any], options: LineOptions = _PLAIN
) -> list[FileRequest]:
    """The requests in a file. One that cannot be used says so in ``error``.

    Args:
        path: the requests file.
        defaults: sampling parameters of lines that do not set them.
        settings: whatever else the answers depend on (the model, the size of images), as JSON values.

    Raises:
        UserError: the file cannot be read.
    """
    reader = _Reader(path.parent, defaults, common_part(defaults, settings, options.prompt), options)
    try:
        check_regular(path, UserError, most=MAX_FILE_BYTES)
        with open(path, "rb") as file:
            for number, line in enumerate(lines_of(file), start=1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    reader.add(number, line)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return reader.requests


def is_openai_file(path: Path) -> bool:
    """Whether the first request of a file is in OpenAI's batch format, so that all of them have to be."""
    try:
        check_regular(path, UserError, most=MAX_FILE_BYTES)
        with open(path, "rb") as file:
            first = next((line for line in lines_of(file) if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
        return is_openai_line(_parse(first.strip()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except PromptError:
        return False


def common_part(defaults: SamplingParams, settings: Mapping[str, Any], prompt: str | None) -> bytes:
    """What the answers to all requests of a job depend on, as the beginning of what a fingerprint is made of."""
    neutral = SamplingParams()
    said = {f.name: str(getattr(defaults, f.name)) for f in fields(defaults)}
    said = {name: value for name, value in said.items() if value != str(getattr(neutral, name))}
    return json.dumps([dict(settings), said, *([] if prompt is None else [prompt])]).encode()


def fingerprint_of(common: bytes, line: bytes) -> str:
    return hashlib.sha256(common + b"\n" + line).hexdigest()[:16]


class _Reader:
    """Lines of one file, in order, to requests."""

    def __init__(self, folder: Path, defaults: SamplingParams, common: bytes, options: LineOptions):
        self.requests: list[FileRequest] = []
        self._folder, self._defaults, self._common, self._options = folder, defaults, common, options
        self._openai = False
        self._first_with: dict[str | int, int] = {}  # id -> number of its line

    def add(self, number: int, line: bytes) -> None:
        index, fingerprint = len(self.requests), fingerprint_of(self._common, line)
        name, content = None, None
        try:
            content = _parse(line)
            if not self.requests:
                self._openai = is_openai_line(content)
            name = _id(content, "custom_id" if self._openai else "id")
            if name is not None and self._first_with.setdefault(name, number) != number:
                raise PromptError(f"the id {name!r} is that of line {self._first_with[name]} too; ids are unique")
            conversation, params = (self._openai_line if self._openai else self._line)(content, line)
            request = FileRequest(index, name, fingerprint, conversation, params, row=content)
        except Exception as problem:  # whatever is wrong with a line is wrong with that line alone
            name = _salvaged_id(line, "custom_id" if self._openai else "id") if name is None else name
            kind = "" if isinstance(problem, UserError) else f"it cannot be used: {type(problem).__name__}: "
            error = one_line(f"line {number}: {kind}{problem}")
            request = FileRequest(index, name, fingerprint, None, self._defaults, error, content)
        self.requests.append(request)

    def _line(self, content: dict[str, Any], line: bytes) -> tuple[list[dict], SamplingParams]:
        _check_keys(content, line, self._options.keep_input)
        _check_characters(content, line, but="id")
        if self._options.prompt is not None and not content.keys() & {"prompt", "messages"}:
            content = content | {"prompt": self._options.prompt}
        return _conversation(content, self._folder), replace(self._defaults, **sampling_of(content))

    def _openai_line(self, content: dict[str, Any], line: bytes) -> tuple[list[dict], SamplingParams]:
        _check_characters(content, line, but="custom_id")
        messages, sampling = chat_request(content, self._options.model_names)
        return [located(message, self._folder) for message in messages], replace(self._defaults, **sampling)


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file with their ends. What a line has beyond ``MAX_LINE_BYTES`` and one more is passed over."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        rest = line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(1 << 20)
        yield line


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise PromptError(f"it has more than {MAX_LINE_BYTES} bytes; give images as paths or URLs")
    try:
        content = parse_json(line)
    except UnicodeDecodeError as error:
        raise PromptError(f"no UTF-8 text ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise PromptError(f"no JSON ({error.msg} at character {error.pos})") from None
    except ValueError as error:
        raise PromptError(f"no JSON ({error})") from None
    if not isinstance(content, dict):
        raise PromptError(f"a JSON object is needed, got {type(content).__name__}")
    return {key: value for key, value in content.items() if value is not None}


def _id(content: dict[str, Any], key: str = "id") -> str | int | None:
    name = _whole(content.get(key))
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise PromptError(f"the {key} is of type {type(name).__name__}; a text or an integer is needed")
    return name


def _salvaged_id(line: bytes, key: str) -> str | int | None:
    """The id of a line that cannot be read as it should: by a reader that takes more, else where the line begins."""
    try:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            first = _ID_FIRST.match(line)
            content = {json.loads(first[1]): json.loads(first[2])} if first else {}
        return _id(content, key) if isinstance(content, dict) else None
    except ValueError:
        return None


def _check_keys(content: dict[str, Any], line: bytes, keep_input: bool) -> None:
    unknown = sorted(content.keys() - {*_OTHER_KEYS, *SAMPLING_KEYS})
    if unknown and not keep_input:
        raise PromptError(f"the key {unknown[0]!r} is unknown; known are {', '.join((*_OTHER_KEYS, *SAMPLING_KEYS))}")


def _check_characters(content: dict[str, Any], line: bytes, but: str) -> None:
    if _HALF_PAIR.search(line):
        for key, value in content.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                if key != but:  # which is only handed on
                    raise PromptError(f"{key} holds half of a surrogate pair, which is no character") from None


def sampling_of(content: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as a line gives them. One that is left out keeps its default, and lifts no limit."""
    given = {key: content[key] for key in SAMPLING_KEYS if key in content}
    return {key: _whole(value) if key in _INTEGER_KEYS else value for key, value in given.items()}


def _whole(value: Any) -> Any:
    """An integer for a float that is one: in a column with gaps, pandas makes floats of all integers."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53 else value


def _conversation(content: dict[str, Any], folder: Path) -> list[dict]:
    given = [key for key in ("prompt", "messages") if key in content]
    if len(given) != 1:
        raise PromptError(f"{' and '.join(given) or 'nothing'} given; one of prompt, messages is needed")
    media = [(kind, source) for kind in ("image", "video") for source in _sources(content, kind)]
    if "messages" in content:
        if media:
            raise PromptError(
                f"{media[0][0]} goes with prompt; in messages, images and videos are items of the content"
            )
        messages = content["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise PromptError("messages is a list of objects with role and content")
        lacking = next((number for number, message in enumerate(messages) if "role" not in message), None)
        if lacking is not None:
            raise PromptError(f"messages[{lacking}] has no role")
        return [located(message, folder) for message in messages]
    if not isinstance(content["prompt"], str):
        raise PromptError(f"prompt is of type {type(content['prompt']).__name__}; a text is needed")
    items = [{"type": kind, kind: locate(source, folder)} for kind, source in media]
    return [{"role": "user", "content": [*items, {"type": "text", "text": content["prompt"]}]}]


def _sources(content: dict[str, Any], kind: str) -> list[str]:
    """Paths and URLs of one kind beside a prompt."""
    sources = [content[kind]] if kind in content else content.get(f"{kind}s", [])
    if kind in content and f"{kind}s" in content:
        raise PromptError(f"{kind} and {kind}s given; one of them is enough")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise PromptError(f"{kind} is a path or a URL, and {kind}s a list of them")
    return sources


def located(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message with every relative path counted from ``folder``; the processor checks its form."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_located_item(item, folder) for item in content]}


def _located_item(item: Any, folder: Path) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: locate(value, folder) if key in _PATH_KEYS else value for key, value in item.items()}


def locate(source: Any, folder: Path) -> Any:
    """What an image or video is read from, with a relative path counted from ``folder``."""
    if isinstance(source, list):  # the frames of a video
        return [locate(each, folder) for each in source]
    if isinstance(source, dict):  # {"image_url": {"url": ...}}
        return {key: locate(value, folder) if key == "url" else value for key, value in source.items()}
    if not isinstance(source, str) or not source or _URL.match(source) or is_base64_media(source):
        return source
    return str(folder / source)
