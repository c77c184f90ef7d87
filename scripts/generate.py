"""Ask the model a question, with or without pictures, or chat with it.

    python scripts/generate.py --model demo --image cat.jpg --prompt "What is this?"

The answer goes to stdout while it is being written, and nothing else does; settings, progress and errors go to stderr.
Exit status: 0 done, 2 something in the call has to be mended, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from qwen3vl_moe.errors import UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Checkpoint directory, hub id, or 'demo'.")] = "demo",
    image: Annotated[list[str] | None, typer.Option(help="Image file or URL, before the text; repeatable.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question. Without it: a chat, one line of stdin a turn.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: the checkpoint's]")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:1, cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16, float32.")] = "auto",
    moe: Annotated[str, typer.Option(help="Experts: tma (Hopper), reference (anywhere), auto.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="Longest prompt and answer, in tokens.")] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Resize larger images to this many pixels.")] = None,
    expert_layout: Annotated[
        str | None, typer.Option(help="published or transformers5, if the checkpoint asks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
) -> None:
    """Ask the model a question, with or without pictures, or chat with it."""
    try:
        if as_json and prompt is None:
            raise UserError("--json needs --prompt: a chat is not one JSON object")
        from qwen3vl_moe.engine import LLM, SamplingParams  # slow to import: not before --help has been answered
        from qwen3vl_moe.image_source import open_image

        for number, source in enumerate(image or []):
            if "://" not in source:
                open_image(source, number)  # a mistyped name should show before the weights are loaded
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        llm = LLM(
            model,
            device=device,
            dtype=dtype,
            moe=moe,
            max_model_len=max_model_len,
            max_pixels=max_pixels,
            expert_layout=expert_layout,
        )
        stderr.print(", ".join(f"{key} {value}" for key, value in llm.settings.items()), style="dim")
        images = [{"type": "image", "image": path} for path in image or []]
        if as_json:
            _write(json.dumps(_answer(llm, images, prompt, params), ensure_ascii=False) + "\n")
        elif prompt is not None:
            _stream(llm, [_user_message(images, prompt)], params)
        else:
            _chat(llm, images, params)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(130 if prompt is not None else 0) from None


def _chat(llm: Any, images: list[dict], params: Any) -> None:
    """One turn per line of stdin until it ends; the images belong to the first turn."""
    conversation: list[dict] = []
    if sys.stdin.isatty():
        stderr.print("Type a message and press Enter; Ctrl-D ends the chat.", style="dim")
    for line in _lines():
        conversation.append(_user_message(images if not conversation else [], line))
        answer = _stream(llm, conversation, params)
        conversation.append({"role": "assistant", "content": answer})


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
    app()
