"""Ask the model a question, with or without pictures, or chat with it, or answer a file of requests.

    python scripts/generate.py --model demo --image cat.jpg --prompt "What is this?"
    python scripts/generate.py --model demo --input requests.jsonl --output answers.jsonl

The answer goes to stdout while it is being written, and nothing else does; settings, progress and errors go to stderr.

With --input, each line of the file is a request, {"prompt": ..., "image": ...} or {"messages": ...}, and each line of
--output is an answer, or says what is wrong with the request; scripts/batch_file.py has all keys of both. The input may
also be in OpenAI's batch format, or parquet, webdataset tars or a folder of images, and the output parquet:
docs/batches.md. The same command goes on after an interruption of any kind, and does nothing when all is done. Answers
are written as they finish and are in the order of the requests when all are there.

Exit status: 0 done, 1 done but some requests of --input could not be answered, 2 something in the call has to be
mended, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import program_options as options
from program import any_text, json_line
from qwen3vl_moe.errors import PromptError, UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: options.Model = "demo",
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL, before the text; repeatable.")] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The question. Without it: a chat, one line of stdin a turn. With --input: what is asked of rows that "
            "bring no prompt."
        ),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help='Answer a file of requests, a JSON object a line: "prompt" (with "image" or "images": paths from the '
            'file\'s folder, or URLs) or "messages"; and, where wanted, "id", "max_tokens", "temperature", "seed", '
            '"stop" and the other sampling parameters, which go before the options here. Or parquet, webdataset tars, '
            "a folder of images, a pattern of such, or OpenAI's batch format. Whoever writes the file "
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
            '"error"; or, in .parquet, those as columns beside the input\'s. The same command goes on where an '
            "interrupted one was.",
        ),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="Only this part of --input: 3/16 is the fourth of sixteen, as ranks count.")
    ] = None,
    prompt_column: options.PromptColumn = None,
    image_column: options.ImageColumn = None,
    id_column: options.IdColumn = None,
    keep_input: options.KeepInput = False,
    drop: options.Drop = None,
    prefix: options.Prefix = "",
    served_model_name: options.ServedModelName = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    moe: options.Moe = "auto",
    max_model_len: options.MaxModelLen = None,
    kv_cache_dtype: options.KVCacheDtype = "auto",
    max_pixels: options.MaxPixels = None,
    media_root: options.MediaRoot = None,
    allow_hosts: options.AllowHosts = None,
    allow_private_hosts: options.AllowPrivateHosts = None,
    expert_layout: options.ExpertLayout = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
) -> None:
    """Ask the model a question, with or without pictures, or chat with it, or answer a file of requests.

    Exit status: 0 done, 1 some requests of --input could not be answered, 2 an error in the call, 130 interrupted.
    """
    try:
        if (requests is None) != (answers is None):
            raise UserError("--input and --output go together: a file of requests, and one for their answers")
        if requests is not None and (image or as_json):
            raise UserError("--input brings images of its own and has an --output: leave out --image and --json")
        columns = prompt_column, image_column, id_column, keep_input, drop, served_model_name
        if requests is None and any((shard, prefix, *columns)):
            raise UserError("--shard, --keep-input, --drop, --prefix and names of columns and models go with --input")
        if as_json and prompt is None:
            raise UserError("--json needs --prompt: a chat is not one JSON object")
        from qwen3vl_moe.engine import LLM, SamplingParams  # slow to import: not before --help has been answered
        from qwen3vl_moe.inputs.access import media_access
        from qwen3vl_moe.inputs.image_source import decode_rgb, open_image

        if allow_private_hosts is None:  # a file of requests may come from anyone
            allow_private_hosts = requests is None
        limits = options.media_limits(media_root, allow_hosts, allow_private_hosts)
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

        if requests is not None and answers is not None:
            from batch_inputs import Job, open_input, parse_shard
            from batch_run import Output, answer_input, is_table

            table, understood = is_table(answers), options.input_options(model, prompt, *columns)
            job = Job(params, {"model": model, "max_pixels": max_pixels}, understood, rows=not table)
            source = open_input(requests, job)
            for note in source.notes:
                stderr.print(note, style="dim")
            keep_input = keep_input or source.kind not in ("lines", "openai")
            name = served_model_name or model
            output = Output.of(answers, source.kind, name, keep_input, prefix, table)
            raise typer.Exit(answer_input(load, source, parse_shard(shard, len(source)), output, stderr))
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
