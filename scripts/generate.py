"""Ask the model a question, with or without pictures and videos, or chat with it, or answer a file of requests.

    python scripts/generate.py --model demo --image examples/shapes.png --prompt "What do you see in this picture?"
    python scripts/generate.py --model MODEL --video walk.mp4 --fps 1 --prompt "What happens?"
    python scripts/generate.py --model demo --input examples/requests.jsonl --output answers.jsonl

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

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import batch_options as batch
import cli_options as cli
from chat import check_pictures, check_videos, opening, say_settings, stream, talk, user_message, write
from program import any_text, json_line
from qwen3vl_moe.errors import UserError

stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.Model = "demo",
    image: cli.Images = None,
    video: cli.Videos = None,
    fps: cli.Fps = None,
    prompt: Annotated[
        str | None, typer.Option(help="The question. Without it: a chat, one line of stdin a turn, as chat.py.")
    ] = None,
    system: cli.System = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help='Answer a file of requests, a JSON object a line: "prompt" (with "image", "images", "video" or '
            '"videos": paths from the file\'s folder, or URLs) or "messages"; and, where wanted, "id", "max_tokens", '
            '"temperature", "seed", "stop" and the other sampling parameters, which go before the options here. Or '
            "parquet, webdataset tars, a folder of images, a pattern of such, or OpenAI's batch format. Whoever writes "
            "the file chooses what is read as an image or video: any local file, and any host on the internet, but "
            "none of this machine or of private networks. --media-root, --allow-hosts and --allow-private-hosts set "
            "other limits: docs/trust.md.",
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
    prompt_column: batch.PromptColumn = None,
    image_column: batch.ImageColumn = None,
    id_column: batch.IdColumn = None,
    keep_input: batch.KeepInput = False,
    drop: batch.Drop = None,
    prefix: batch.Prefix = "",
    served_model_name: batch.ServedModelName = None,
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
    data_parallel_size: cli.DataParallelSize = 1,
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
            help="Download images and videos from this machine and from private networks too. [default: neither for "
            "--input nor for a chat from a pipe]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
) -> None:
    """Ask the model a question, with or without pictures and videos, or chat with it, or answer a file of requests.

    Exit status: 0 done, 1 some requests of --input could not be answered, 2 an error in the call, 130 interrupted.
    """
    given = dict(locals())
    try:
        if (requests is None) != (answers is None):
            raise UserError("--input and --output go together: a file of requests, and one for their answers")
        if requests is not None and (image or video or system is not None or as_json):
            raise UserError(
                "--input brings media of its own and has an --output: leave out --system, --image, --video and --json"
            )
        columns = prompt_column, image_column, id_column, keep_input, drop, served_model_name
        if requests is None and any((shard, prefix, *columns)):
            raise UserError("--shard, --keep-input, --drop, --prefix and names of columns and models go with --input")
        if fps is not None and not video and (prompt is not None or requests is not None):
            raise UserError("--fps is of videos: give --video")
        if as_json and prompt is None:
            raise UserError("--json needs --prompt: a chat is not one JSON object")
        from qwen3vl_moe.engine import LLM  # slow to import: not before --help has been answered

        if allow_private_hosts is None:  # a file of requests, and a pipe, may come from anyone
            given["allow_private_hosts"] = requests is None and (prompt is not None or sys.stdin.isatty())
        limits, params = cli.media_limits(given), cli.sampling_params(given, one_answer=requests is None)
        media = check_pictures(image or [], limits)  # a bad file should show before the weights are loaded
        media += check_videos(video or [], fps, limits)

        def load() -> LLM:
            llm = LLM(model, **cli.engine_options(given), **limits)
            say_settings(llm)
            return llm

        if requests is not None and answers is not None:
            from batch_inputs import Job, open_input, parse_shard
            from batch_run import Output, answer_input, is_table

            table, understood = is_table(answers), batch.input_options(model, prompt, *columns)
            job = Job(params, batch.answer_settings(given), understood, rows=not table)
            source = open_input(requests, job)
            for note in source.notes:
                stderr.print(note, style="dim")
            keep_input = keep_input or source.kind not in ("lines", "openai")
            name = served_model_name or model
            output = Output.of(answers, source.kind, name, keep_input, prefix, table)
            raise typer.Exit(answer_input(load, source, parse_shard(shard, len(source)), output, stderr))
        llm = load()
        if prompt is None:
            talk(llm, media, params, system, fps)
        else:
            conversation = [*opening(system), user_message(media, prompt)]
            if as_json:
                write(json_line(_answer(llm, conversation, params)))
            else:
                stream(llm, conversation, params)
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(0 if prompt is None and requests is None else 130) from None


def _answer(llm: Any, conversation: list[dict], params: Any) -> dict:
    (output,) = llm.chat(conversation, params)
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


if __name__ == "__main__":
    any_text()
    app()
