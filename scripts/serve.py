"""Serve a model: OpenAI's API over HTTP, and a page to look at.

    python scripts/serve.py --model demo
    python scripts/serve.py --model Qwen/Qwen3-VL-30B-A3B-Instruct --port 8000

Then open http://127.0.0.1:8000, or give http://127.0.0.1:8000/v1 to any client of OpenAI's. docs/serving.md has what is
understood, the limits, and how to measure it. Ctrl-C (or SIGTERM) finishes what was asked for and ends; a second one
ends at once.

Exit status: 0 ended after a signal, 1 the engine or one of the processes has failed, 2 something in the call has to be
mended, 130 ended by a second signal, or while the weights were loaded.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

import cli_options as cli
from program import any_text
from qwen3vl_moe.errors import OptionError, UserError

MIB = 1 << 20
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    model: cli.Model = "demo",
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: any.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="What clients call the model. [default: --model as it was given]")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="QWEN3VL_MOE_API_KEY", help="Key that clients have to give.", show_envvar=True),
    ] = None,
    origins: Annotated[
        str | None,
        typer.Option(
            help="Pages that may ask beside the server's own, as a proxy before it shows them: llm.example.org, commas "
            "between them."
        ),
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Answers that may wait; more are refused with 429.")] = 1024,
    max_body_mib: Annotated[int, typer.Option(help="Largest request, in MiB.")] = 64,
    max_images: Annotated[int, typer.Option(help="Most images of a request.")] = 64,
    max_image_mib: Annotated[int, typer.Option(help="Largest image file, in MiB.")] = 20,
    max_image_megapixels: Annotated[int, typer.Option(help="Largest image, in millions of pixels.")] = 64,
    max_videos: Annotated[int, typer.Option(help="Most videos of a request.")] = 8,
    max_video_mib: Annotated[int, typer.Option(help="Largest video file, in MiB.")] = 48,
    max_video_gigapixels: Annotated[
        int, typer.Option(help="Most pixels of all frames of a video file, in billions: what decoding may take.")
    ] = 50,
    max_video_frames: Annotated[int, typer.Option(help="Most frames that are taken of a video.")] = 768,
    allow_remote_images: Annotated[
        bool, typer.Option(help="Download images and videos that requests give as URLs.")
    ] = False,
    allow_hosts: Annotated[
        str | None,
        typer.Option(
            help="With --allow-remote-images: from these hosts alone, names with commas between them, .example.org for "
            "all below it. Hosts of this machine and of private networks are never reached."
        ),
    ] = None,
    device: cli.Device = "auto",
    dtype: cli.Dtype = "auto",
    moe: cli.Moe = "auto",
    max_model_len: cli.MaxModelLen = None,
    max_num_seqs: cli.MaxNumSeqs = None,
    max_prefill_tokens: cli.MaxPrefillTokens = None,
    gpu_memory_utilization: cli.GpuMemoryUtilization = None,
    kv_cache_dtype: cli.KvCacheDtype = "auto",
    tensor_parallel_size: cli.TensorParallelSize = 1,
    data_parallel_size: cli.OneEngine = 1,
    eager: cli.Eager = False,
    prefix_caching: Annotated[bool, typer.Option(help="Let prompts reuse beginnings of earlier ones.")] = True,
    min_pixels: cli.MinPixels = None,
    max_pixels: cli.MaxPixels = None,
    expert_layout: cli.ExpertLayout = None,
    load_format: Annotated[
        str, typer.Option(help="auto; dummy or dummy-fp8: random weights of --model's sizes, to measure.")
    ] = "auto",
) -> None:
    """Serve a model: OpenAI's API over HTTP, and a page to look at.

    Exit status: 0 ended after a signal, 1 a process has failed, 2 an error in the call, 130 ended by a second signal.
    """
    options = cli.engine_options(locals())
    may_be_0 = {"--max-images": max_images, "--max-videos": max_videos, "--max-waiting": max_waiting}
    at_least_1 = {"--max-body-mib": max_body_mib, "--max-image-mib": max_image_mib, "--max-video-mib": max_video_mib}
    at_least_1 |= {"--max-image-megapixels": max_image_megapixels, "--max-video-gigapixels": max_video_gigapixels}
    at_least_1 |= {"--max-video-frames": max_video_frames}
    try:
        cli.require_one_engine(data_parallel_size, "start one server for each, behind a proxy that shares requests")
        for option, value in {**may_be_0, **at_least_1}.items():
            if value < (option in at_least_1):
                raise OptionError(f"{option} {value} leaves nothing to serve; give a larger number")
        if allow_hosts is not None and not allow_remote_images:
            raise OptionError("--allow-hosts needs --allow-remote-images")
        if api_key is not None and (not api_key or not api_key.isascii() or "".join(api_key.split()) != api_key):
            raise OptionError("--api-key has to be a text of ASCII characters without spaces or line breaks")
        pages = tuple(part.strip().lower() for part in (origins or "").split(",") if part.strip())
        for page in pages:
            if "/" in page:
                raise OptionError(f"--origins {page}: the host of a page is needed, such as llm.example.org:8443")
        try:
            from qwen3vl_moe.server.run import Server, bind  # slow to import: not before --help has been answered
        except ImportError as error:
            raise OptionError(f"{error.name} is missing: pip install 'qwen3vl-moe[serve]'") from None
        from qwen3vl_moe.inputs.access import media_access
        from qwen3vl_moe.server.limits import Limits
        from qwen3vl_moe.server.media import MediaLimits

        access = media_access(None, allow_hosts if allow_remote_images else "", allow_private_hosts=False)
        bound = bind(host, port)
        llm = _load(model, load_format, **options, enable_prefix_caching=prefix_caching)
        stderr.print(", ".join(f"{key} {value}" for key, value in llm.settings.items()), style="dim")
        media = MediaLimits(
            images=max_images,
            image_bytes=max_image_mib * MIB,
            image_pixels=max_image_megapixels * 1_000_000,
            max_pixels=llm.processor.image_settings.max_pixels,
            videos=max_videos,
            video_bytes=max_video_mib * MIB,
            video_pixels=max_video_gigapixels * 1_000_000_000,
            video_frames=max_video_frames,
            usual_frames=llm.processor.video_settings.max_frames,
            total_pixels=llm.processor.video_settings.max_pixels,
            remote=allow_remote_images,
            access=access,
        )
        limits = Limits(max_waiting, max_body_mib * MIB, media, pages)
        try:
            status = Server(llm, bound, served_model_name or model, limits, api_key, stderr.print).run()
        finally:
            llm.close()
    except UserError as error:
        stderr.print(f"error: {error}")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print()
        raise typer.Exit(130) from None
    raise typer.Exit(status)


def _load(model: str, load_format: str, **options: Any) -> Any:
    if load_format == "auto":
        from qwen3vl_moe.engine import LLM

        return LLM(model, **options)
    from benchmarking.loading import load_llm

    for name in ("min_pixels", "max_pixels", "expert_layout"):
        if name in options:
            raise OptionError(f"--load-format {load_format} does not go with --{name.replace('_', '-')}")
    return load_llm(model, load_format=load_format, routing="balanced", **options)


if __name__ == "__main__":
    any_text()
    app()
