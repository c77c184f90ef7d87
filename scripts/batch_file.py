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
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

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
_ID_FIRST = re.compile(rb'\s*\{\s*"id"\s*:\s*("(?:[^"\\\x00-\x1f]|\\.)*"|-?[0-9]{1,40})\s*[,}]')


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
    neutral = SamplingParams()
    said = {f.name: str(getattr(defaults, f.name)) for f in fields(defaults)}
    said = {name: value for name, value in said.items() if value != str(getattr(neutral, name))}
    common = json.dumps([dict(settings), said]).encode()
    requests: list[FileRequest] = []
    first_with: dict[str | int, int] = {}
    try:
        check_regular(path, UserError, most=MAX_FILE_BYTES)
        with open(path, "rb") as file:
            for number, line in enumerate(lines_of(file), start=1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    requests.append(_request(len(requests), number, line, common, defaults, path.parent, first_with))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return requests


def _request(
    index: int,
    number: int,
    line: bytes,
    common: bytes,
    defaults: SamplingParams,
    folder: Path,
    first_with: dict[str | int, int],
) -> FileRequest:
    fingerprint = hashlib.sha256(common + b"\n" + line).hexdigest()[:16]
    name = None
    try:
        content = _parse(line)
        name = _id(content)
        if name is not None and first_with.setdefault(name, number) != number:
            raise PromptError(f"the id {name!r} is that of line {first_with[name]} too; ids are unique")
        _check_keys(content, line)
        params = replace(defaults, **_sampling(content))
        return FileRequest(index, name, fingerprint, _conversation(content, folder), params)
    except Exception as problem:  # whatever is wrong with a line is wrong with that line alone
        name = _salvaged_id(line) if name is None else name
        kind = "" if isinstance(problem, UserError) else f"it cannot be used: {type(problem).__name__}: "
        return FileRequest(index, name, fingerprint, None, defaults, one_line(f"line {number}: {kind}{problem}"))


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


def _id(content: dict[str, Any]) -> str | int | None:
    name = _whole(content.get("id"))
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise PromptError(f"the id is of type {type(name).__name__}; a text or an integer is needed")
    return name


def _salvaged_id(line: bytes) -> str | int | None:
    """The id of a line that cannot be read as it should: by a reader that takes more, else where the line begins."""
    try:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            first = _ID_FIRST.match(line)
            content = {"id": json.loads(first[1])} if first else {}
        return _id(content) if isinstance(content, dict) else None
    except ValueError:
        return None


def _check_keys(content: dict[str, Any], line: bytes) -> None:
    unknown = sorted(content.keys() - {*_OTHER_KEYS, *SAMPLING_KEYS})
    if unknown:
        raise PromptError(f"the key {unknown[0]!r} is unknown; known are {', '.join((*_OTHER_KEYS, *SAMPLING_KEYS))}")
    if _HALF_PAIR.search(line):
        for key, value in content.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                if key != "id":  # which is only handed on
                    raise PromptError(f"{key} holds half of a surrogate pair, which is no character") from None


def _sampling(content: dict[str, Any]) -> dict[str, Any]:
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
        return [_located(message, folder) for message in messages]
    if not isinstance(content["prompt"], str):
        raise PromptError(f"prompt is of type {type(content['prompt']).__name__}; a text is needed")
    items = [{"type": kind, kind: _locate(source, folder)} for kind, source in media]
    return [{"role": "user", "content": [*items, {"type": "text", "text": content["prompt"]}]}]


def _sources(content: dict[str, Any], kind: str) -> list[str]:
    """Paths and URLs of one kind beside a prompt."""
    sources = [content[kind]] if kind in content else content.get(f"{kind}s", [])
    if kind in content and f"{kind}s" in content:
        raise PromptError(f"{kind} and {kind}s given; one of them is enough")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise PromptError(f"{kind} is a path or a URL, and {kind}s a list of them")
    return sources


def _located(message: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A message with every relative path counted from ``folder``; the processor checks its form."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": [_located_item(item, folder) for item in content]}


def _located_item(item: Any, folder: Path) -> Any:
    if not isinstance(item, dict):
        return item
    return {key: _locate(value, folder) if key in _PATH_KEYS else value for key, value in item.items()}


def _locate(source: Any, folder: Path) -> Any:
    if isinstance(source, list):  # the frames of a video
        return [_locate(each, folder) for each in source]
    if isinstance(source, dict):  # {"image_url": {"url": ...}}
        return {key: _locate(value, folder) if key == "url" else value for key, value in source.items()}
    if not isinstance(source, str) or not source or _URL.match(source) or is_base64_media(source):
        return source
    return str(folder / source)
