"""Ask the model a question, with or without pictures, or chat with it, or answer a file of requests.

    python scripts/generate.py --model demo --image cat.jpg --prompt "What is this?"
    python scripts/generate.py --model demo --input requests.jsonl --output answers.jsonl

The answer goes to stdout while it is being written, and nothing else does; settings, progress and errors go to stderr.

With --input, each line of the file is a request, {"prompt": ..., "image": ...} or {"messages": ...}, and each line of
--output is an answer, or says what is wrong with the request; scripts/batch_file.py has all keys of both. The same
command goes on after an interruption of any kind, and does nothing when all is done. Answers are written as they finish
and are in the order of the requests when all are there.

Exit status: 0 done, 1 done but some requests of --input could not be answered, 2 something in the call has to be
mended, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from program import any_text, json_line
from qwen3vl_moe.errors import PromptError, UserError, one_line

SECONDS_BETWEEN_LINES = 30.0  # of progress, where stderr is no terminal

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'demo'.")] = "demo",
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL, before the text; repeatable.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question. Without it: a chat, one line of stdin a turn.")
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help='Answer a file of requests, a JSON object a line: "prompt" (with "image" or "images": paths from the '
            'file\'s folder, or URLs) or "messages"; and, where wanted, "id", "max_tokens", "temperature", "seed", '
            '"stop" and the other sampling parameters, which go before the options here. Whoever writes the file '
            "chooses what is read as an image: any local file, and any host on the internet, but none of this machine "
            "or of private networks. --media-root, --allow-hosts and --allow-private-hosts set other limits: "
            "docs/trust.md.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help='Where the answers to --input go: "index", "id", and "text" with "finish_reason" and token counts, or '
            '"error". The same command goes on where an interrupted one was.',
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: the checkpoint's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    moe: Annotated[str, typer.Option(help="Experts: tma (Hopper), triton (GPUs), reference, auto.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, or fp8: twice the tokens in the cache.")] = "auto",
    max_pixels: Annotated[int | None, typer.Option(help="Resize larger images to this many pixels.")] = None,
    media_root: Annotated[
        Path | None, typer.Option(help="Read image files from this directory and those in it alone.")
    ] = None,
    allow_hosts: Annotated[
        str | None,
        typer.Option(
            help="Download images from these hosts alone: names with commas between them, .example.org for all below "
            "it; '' for none."
        ),
    ] = None,
    allow_private_hosts: Annotated[
        bool | None,
        typer.Option(
            "--allow-private-hosts/--no-private-hosts",
            help="Download images from this machine and from private networks too. [default: not for --input]",
        ),
    ] = None,
    expert_layout: Annotated[
        str | None, typer.Option(help="published or transformers5, if the checkpoint asks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
) -> None:
    """Ask the model a question, with or without pictures, or chat with it, or answer a file of requests.

    Exit status: 0 done, 1 some requests of --input could not be answered, 2 an error in the call, 130 interrupted.
    """
    try:
        if (requests is None) != (answers is None):
            raise UserError("--input and --output go together: a file of requests, and one for their answers")
        if requests is not None and (image or prompt is not None or as_json):
            raise UserError("--input brings prompts and images of its own: leave out --prompt, --image and --json")
        if as_json and prompt is None:
            raise UserError("--json needs --prompt: a chat is not one JSON object")
        from qwen3vl_moe.engine import LLM, SamplingParams  # slow to import: not before --help has been answered
        from qwen3vl_moe.inputs.access import media_access
        from qwen3vl_moe.inputs.image_source import decode_rgb, open_image

        if allow_private_hosts is None:  # a file of requests may come from anyone
            allow_private_hosts = requests is None
        hosts = None if allow_hosts is None else [name for name in allow_hosts.split(",") if name.strip()]
        limits = {"media_root": media_root, "allow_hosts": hosts, "allow_private_hosts": allow_private_hosts}
        access = media_access(**limits)
        for number, source in enumerate(image or []):
            if "://" not in source:
                decode_rgb(open_image(source, number, access))  # a bad file should show before the weights are loaded
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)

        def load() -> LLM:
            llm = LLM(
                model,
                device=device,
                dtype=dtype,
                moe=moe,
                max_model_len=max_model_len,
                kv_cache_dtype=kv_cache_dtype,
                max_pixels=max_pixels,
                expert_layout=expert_layout,
                **limits,
            )
            stderr.print(", ".join(f"{key} {value}" for key, value in llm.settings.items()), style="dim")
            return llm

        if requests is not None:
            raise typer.Exit(_answer_file(load, requests, answers, params, {"model": model, "max_pixels": max_pixels}))
        llm = load()
        images = [{"type": "image", "image": path} for path in image or []]
        if as_json:
            _write(json_line(_answer(llm, images, prompt, params)))
        elif prompt is not None:
            _stream(llm, [_user_message(images, prompt)], params)
        else:
            _chat(llm, images, params)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(0 if prompt is None and requests is None else 130) from None


def _chat(llm: Any, images: list[dict], params: Any) -> None:
    """One turn per line of stdin until it ends; the images belong to the first turn.

    A line that cannot be used ends a chat from a pipe. At a terminal it can be said otherwise: the chat goes on.
    """
    conversation: list[dict] = []
    if sys.stdin.isatty():
        stderr.print("Type a message and press Enter; Ctrl-D ends the chat.", style="dim")
    for line in _lines():
        turn = _user_message(images if not conversation else [], line)
        try:
            answer = _stream(llm, [*conversation, turn], params)
        except PromptError as error:
            if not sys.stdin.isatty():
                raise
            stderr.print(f"error: {error}")
        else:
            conversation += [turn, {"role": "assistant", "content": answer}]


def _lines() -> Iterator[str]:
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            stderr.print("> ", end="", style="bold")
        try:
            line = input()
        except EOFError:
            if interactive:
                stderr.print()
            return
        except UnicodeDecodeError as error:
            raise UserError(f"stdin is no {error.encoding} text ({error.reason})") from None
        if line.strip():
            yield line


def _user_message(images: list[dict], text: str) -> dict:
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def _stream(llm: Any, conversation: list[dict], params: Any) -> str:
    """Write the answer while it comes; return it whole."""
    for output in llm.stream(conversation, params):
        _write(output.outputs[0].new_text)
    _write("\n")
    answer, metrics = output.outputs[0], output.metrics
    seconds = metrics.finished_time - metrics.arrival_time
    first = metrics.first_token_time - metrics.arrival_time
    stderr.print(
        f"{len(output.prompt_token_ids)} prompt tokens ({output.num_image_tokens} of images), "
        f"{len(answer.token_ids)} answer tokens in {seconds:.2f} s, the first after {first:.2f} s; "
        f"ended by {answer.finish_reason}",
        style="dim",
    )
    return answer.text


def _answer(llm: Any, images: list[dict], prompt: str, params: Any) -> dict:
    (output,) = llm.chat([_user_message(images, prompt)], params)
    answer, metrics = output.outputs[0], output.metrics
    return {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "image_tokens": output.num_image_tokens,
        "seconds": {
            "to_first_token": metrics.first_token_time - metrics.arrival_time,
            "total": metrics.finished_time - metrics.arrival_time,
            **metrics.stages,
        },
        **llm.settings,
    }


def _answer_file(load: Callable, source: Path, target: Path, params: Any, settings: dict) -> int:
    """Answer what is left of a file of requests; the exit status."""
    from batch_answers import AnswerFile
    from batch_file import read_requests

    requests, name = read_requests(source, params, settings), one_line(str(target))
    with AnswerFile(target, requests, source) as answers:
        todo, before = answers.todo, len(answers.done)
        if answers.repaired:
            stderr.print(f"{name}: what was written in part only is answered again")
        if before and todo:
            stderr.print(f"{name} has {before} of {len(requests)} answers; going on with the other {len(todo)}")
        try:
            # The model first: a mistake in its options should leave no records behind that were made with them.
            llm = load() if any(request.error is None for request in todo) else None
            with _ended_by_signals():
                speed = _answer_requests(llm, todo, answers) if todo else "nothing to do"
                answers.sort()
        except (KeyboardInterrupt, SystemExit):
            stderr.print(f"interrupted: {len(answers.done)} of {len(requests)} are in {name}; the same command goes on")
            raise
        errors = answers.num_errors
    again = "; delete the lines with an error to have those requests tried again" if errors else ""
    stderr.print(f"{name} is complete: {len(requests) - errors} answers, {errors} errors; {speed}{again}")
    return 1 if errors else 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A signal to end ends the program as an exception does, so that nothing is left lying about half written.

    Only while something is written: some modules in C++ do not survive an exception while they are being imported.
    """

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    # A job under nohup ignores one of them, and goes on doing so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, stop)
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _answer_requests(llm: Any, todo: list, answers: Any) -> str:
    """Write a record for each request of ``todo``; how fast that was, in words."""
    start = said = time.monotonic()
    requests = tokens = 0

    def speed() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        return f"{requests / seconds:.1f} requests/s, {tokens / seconds:.0f} answer tokens/s"

    valid = [request for request in todo if request.error is None]
    for request in todo:
        if request.error is not None:
            answers.write(request, request.error)
    if not valid:
        return "no request of this run could be read"
    conversations, params = [request.conversation for request in valid], [request.params for request in valid]
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
    with (
        Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress,
        closing(llm.as_completed(conversations, params, return_exceptions=True)) as results,
    ):
        bar = progress.add_task(speed(), total=len(valid))
        for number, result in results:
            answers.write(valid[number], result)
            requests += 1
            tokens += 0 if isinstance(result, Exception) else len(result.outputs[0].token_ids)
            progress.update(bar, advance=1, description=speed())
            if not stderr.is_terminal and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                stderr.print(f"{requests} of {len(valid)}, {speed()}")
    return speed()


def _write(text: str) -> None:
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
