"""Talk with the model: a line is a turn, and pictures and videos may come at any turn.

    python scripts/chat.py                       # the demo
    python scripts/chat.py --model Qwen/Qwen3-VL-30B-A3B-Instruct --image examples/cat.jpg

/image FILE adds a picture to the next message and /video FILE a video, and so does a path that is dropped on the
terminal; /new begins anew, /exit or Ctrl-D ends the chat, /help lists all of this. Answers go to stdout while they are
written, and nothing else does. Lines may come from a pipe, too: the first that cannot be used then ends the chat.

Exit status: 0 done, 2 something in the call, or a line of a pipe, has to be mended.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

import typer
from rich.console import Console

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import PromptError, UserError

COMMANDS = {
    "/image FILE ...": "add pictures (files or URLs) to your next message; a pasted path does the same",
    "/video FILE ...": "the same for videos",
    "/new": "forget all that was said",
    "/exit": "end the chat; so does Ctrl-D",
    "/help": "this list",
}
_COMMAND = re.compile(r"/[a-z]+")
_SHELL_WORD = re.compile(r"""\s*(?:'([^']*)'|"([^"]*)"|((?:\\.|[^\s\\'"])+))(?=\s|$)""")
_ESCAPED = re.compile(r"\\(.)")
SUFFIXES = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".jp2", ".avif", ".ppm", ".heic"),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".flv", ".ts", ".3gp"),
}
WORDS = {"image": "picture", "video": "video"}

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.Model = "demo",
    image: cli.Images = None,
    video: cli.Videos = None,
    fps: cli.Fps = None,
    system: cli.System = None,
    max_tokens: cli.MaxTokens = 512,
    temperature: cli.Temperature = None,
    top_p: cli.TopP = None,
    top_k: cli.TopK = None,
    min_p: cli.MinP = None,
    repetition_penalty: cli.RepetitionPenalty = None,
    presence_penalty: cli.PresencePenalty = None,
    frequency_penalty: cli.FrequencyPenalty = None,
    stop: cli.Stop = None,
    seed: cli.Seed = None,
    sampling: cli.Sampling = None,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "auto",
    moe: cli.Moe = "auto",
    max_model_len: cli.MaxModelLen = None,
    max_num_seqs: cli.MaxNumSeqs = None,
    max_prefill_tokens: cli.MaxPrefillTokens = None,
    gpu_memory_utilization: cli.GpuMemoryUtilization = None,
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    tensor_parallel_size: cli.TensorParallelSize = 1,
    eager: cli.Eager = False,
    min_pixels: cli.MinPixels = None,
    max_pixels: cli.MaxPixels = None,
    expert_layout: cli.ExpertLayout = None,
    engine: cli.Engine = None,
    media_root: cli.MediaRoot = None,
    allow_hosts: cli.AllowHosts = None,
    allow_private_hosts: Annotated[
        bool | None,
        typer.Option(
            "--allow-private-hosts/--no-private-hosts",
            help="Download from this machine and from private networks too. [default: at a terminal alone]",
        ),
    ] = None,
) -> None:
    """Talk with the model: a line is a turn, and pictures and videos may come at any turn (/help).

    Exit status: 0 done, 2 something in the call, or a line of a pipe, has to be mended.
    """
    given = dict(locals())
    given["allow_private_hosts"] = _at_a_terminal() if allow_private_hosts is None else allow_private_hosts
    try:
        from qwen3vl_moe.engine import LLM  # slow to import: not before --help has been answered

        limits, params = cli.media_limits(given), cli.sampling_params(given, one_answer=True)
        media = check_pictures(image or [], limits) + check_videos(video or [], fps, limits)
        llm = LLM(model, **cli.engine_options(given), **limits)
        say_settings(llm)
        talk(llm, media, params, system, fps)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(0) from None


def check_pictures(sources: list[str], limits: dict[str, Any]) -> list[dict]:
    """Items of a message for pictures; files are decoded, as a bad one should show before the weights are loaded.

    Raises:
        PromptError: a file is missing, is no picture, or may not be read.
    """
    from qwen3vl_moe.inputs.access import media_access

    return [_picture(source, number, media_access(**limits)) for number, source in enumerate(sources)]


def _picture(source: str, number: int, access: Any) -> dict:
    from qwen3vl_moe.inputs.image_source import decode_rgb, open_image

    if "://" not in source:
        decode_rgb(open_image(source, number, access))
    return {"type": "image", "image": source}


def check_videos(sources: list[str], fps: float | None, limits: dict[str, Any]) -> list[dict]:
    """The same for videos, of which only the containers are opened.

    Args:
        fps: frames taken of a second; None: as the checkpoint says.

    Raises:
        PromptError: a file is missing, is no video, or may not be read; or there are no such frames.
    """
    from qwen3vl_moe.inputs.access import media_access
    from qwen3vl_moe.inputs.video import VideoOptions

    VideoOptions.of({"fps": fps}, "the call")
    return [_video(source, number, media_access(**limits), fps) for number, source in enumerate(sources)]


def _video(source: str, number: int, access: Any, fps: float | None) -> dict:
    from qwen3vl_moe.inputs.fetch import open_file
    from qwen3vl_moe.inputs.video_file import open_video_file

    if "://" not in source:
        where = f"video {number} ({source!r})"
        open_video_file(open_file(source, where, access), where)
    return {"type": "video", "video": source, "fps": fps}


def say_settings(llm: Any) -> None:
    stderr.print(", ".join(f"{key} {value}" for key, value in llm.settings.items()), style="dim")


def user_message(media: list[dict], text: str) -> dict:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def opening(system: str | None) -> list[dict]:
    """What a conversation begins with."""
    return [] if system is None else [{"role": "system", "content": system}]


def talk(llm: Any, media: list[dict], params: Any, system: str | None = None, fps: float | None = None) -> None:
    """A turn per line of stdin until it ends or says /exit; ``media`` belong to the first turn.

    What cannot be used ends a chat from a pipe. At a terminal it can be said otherwise: the chat goes on, and pictures
    and videos that were added stay for the next message.

    Args:
        fps: frames taken of a second of each video; None: as the checkpoint says.

    Raises:
        PromptError: a line of a pipe cannot be used.
    """
    conversation, waiting = opening(system), list(media)
    interactive = _at_a_terminal()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing and history
        stderr.print(
            "Type a message and press Enter; /image FILE adds a picture, /video FILE a video, /help lists the rest.",
            style="dim",
        )
    for line in _lines(interactive):
        try:
            sources, text, command = read_line(line, interactive)
            if command == "/exit":
                return
            if command == "/help":
                width = max(map(len, COMMANDS))
                stderr.print("\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()), style="dim")
            elif command == "/new":
                conversation, waiting = opening(system), []
                stderr.print("a new conversation", style="dim")
            added: list[dict] = []
            for kind, source in sources:
                number = sum(item["type"] == kind for item in (*waiting, *added))
                if kind == "image":
                    added.append(_picture(source, number, llm.processor.access))
                else:
                    added.append(_video(source, number, llm.processor.access, fps))
            waiting += added
            if added and interactive and not text:
                stderr.print(f"{_count(waiting)} for your next message", style="dim")
            if not text:
                continue
            turn = user_message(waiting, text)
            answer = stream(llm, [*conversation, turn], params)
        except PromptError as error:
            if not interactive:
                raise
            stderr.print(f"error: {error}")
            if waiting and text:
                stderr.print(f"{_count(waiting)} still added; /new lets go of all that was said", style="dim")
        else:
            conversation += [turn, {"role": "assistant", "content": answer}]
            waiting = []
    if waiting and not conversation[len(opening(system)) :]:
        stderr.print(f"{_count(waiting)} never asked about: say something after that", style="dim")


def read_line(line: str, interactive: bool) -> tuple[list[tuple[str, str]], str, str]:
    """What a line asks for: pictures and videos ("image" or "video", and its path), a text, a command.

    Each may be empty. A path is looked for only at a terminal: what comes from a pipe names files by /image and /video
    or not at all.

    Raises:
        PromptError: there is no such command, or /image or /video names nothing.
    """
    word, _, rest = line.rstrip().partition(" ")
    if word in ("/image", "/video"):
        kind = word[1:]
        sources, left = _leading_words(rest, lambda _: kind)
        if left or _is_file(_as_path(rest.strip())):  # a lone quote, or a name with spaces in it
            sources = [(kind, _as_path(rest.strip()))]
        if not sources:
            raise PromptError(f"{word} needs the path or URL of a {WORDS[kind]}")
        return sources, "", word
    if word in ("/exit", "/quit"):
        return [], "", "/exit"
    if word in ("/new", "/help"):
        return [], "", word
    if interactive:
        sources, left = _leading_words(line, lambda path: _kind_of(path) if _is_file(path) else None)
        if sources:
            return sources, left, ""
    if _COMMAND.fullmatch(word):
        raise PromptError(f"there is no command {word}; /help lists them, and a space before it makes it a message")
    return [], line, ""


def _kind_of(path: str) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if Path(path).suffix.lower() in suffixes), None)


def _leading_words(line: str, kind_of: Callable[[str], str | None]) -> tuple[list[tuple[str, str]], str]:
    """The paths of some kind that a line begins with, as shells and terminals quote them; and the rest."""
    sources, at = [], 0
    while match := _SHELL_WORD.match(line, at):
        single, double, bare = match.groups()
        path = _as_path(next(text for text in (single, double, bare and _ESCAPED.sub(r"\1", bare)) if text is not None))
        kind = kind_of(path)
        if kind is None:
            break
        sources.append((kind, path))
        at = match.end()
    return sources, line[at:].strip()


def _as_path(text: str) -> str:
    """The path of a file:// URL or of ~; other URLs and paths as they are."""
    if text.startswith("file://"):
        return unquote(urlsplit(text).path)
    return text if "://" in text else os.path.expanduser(text)


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL in it
        return False


def _count(media: list[dict]) -> str:
    """As in "2 pictures and 1 video"."""
    counts = {word: sum(item["type"] == kind for item in media) for kind, word in WORDS.items()}
    return " and ".join(f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count)


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _lines(interactive: bool) -> Iterator[str]:
    edited = interactive and sys.stdout.isatty()  # else the prompt would be part of what is on stdout
    while True:
        if interactive and not edited:
            stderr.print("> ", end="", style="bold")
        try:
            line = input("> " if edited else "")
        except EOFError:
            if interactive:
                stderr.print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is no {error.encoding} text ({error.reason})") from None
        if line.strip():
            yield line


def stream(llm: Any, conversation: list[dict], params: Any) -> str:
    """Write the answer while it comes; return it whole."""
    for output in llm.stream(conversation, params):
        write(output.outputs[0].new_text)
    write("\n")
    answer, metrics = output.outputs[0], output.metrics
    seconds = metrics.finished_time - metrics.arrival_time
    first = metrics.first_token_time - metrics.arrival_time
    stderr.print(
        f"{len(output.prompt_token_ids)} prompt tokens ({output.num_image_tokens} of images and videos), "
        f"{len(answer.token_ids)} answer tokens in {seconds:.2f} s, the first after {first:.2f} s; "
        f"ended by {answer.finish_reason}",
        style="dim",
    )
    return answer.text


def write(text: str) -> None:
    """Put text on stdout at once; a reader that has seen enough ends the program with status 0."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes stdout once more at exit, which would fail again and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough: no error
            raise typer.Exit(0) from None
        raise UserError(f"the answer cannot be written to stdout: {error.strerror}") from None


if __name__ == "__main__":
    any_text()
    app()
