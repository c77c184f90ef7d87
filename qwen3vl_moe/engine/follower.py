"""What a process of another rank than the first does: load its part of the model, and follow."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from qwen3vl_moe.engine.executor import Executor
from qwen3vl_moe.engine.options import EngineOptions
from qwen3vl_moe.engine.prepare import prepare
from qwen3vl_moe.engine.workers import LOADER, Workers, devices_of, join, started_by_torchrun
from qwen3vl_moe.errors import UserError
from qwen3vl_moe.model import Qwen3VLMoe


def main(spec: Mapping[str, Any]) -> None:
    """Follow until the first rank ends.

    Args:
        spec: ``rank``, ``size``, ``port`` and ``device``; ``loader``, the "module:function" that makes the model from
            ``arguments``, the device and the ranks; ``options``, fields of :class:`.EngineOptions`; ``threads``.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first rank decides
    threading.Thread(target=end_with_the_first, daemon=True).start()
    # Standard output is for the one line of an error; what libraries print there goes to stderr.
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        torch.set_num_threads(spec["threads"])
        device = torch.device(spec["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        store = TCPStore("127.0.0.1", spec["port"], spec["size"], is_master=False)
        ranks = join(spec["rank"], spec["size"], device, store)
        model = loader_of(spec["loader"])(**spec["arguments"], device=device, ranks=ranks)
        follow(model, EngineOptions(**spec["options"]))
    except (UserError, RuntimeError, MemoryError) as error:
        # A rank that is left by the others fails, too; the first one then says why.
        report.write(str(error).splitlines()[0] if str(error) else type(error).__name__)
        report.close()
        os._exit(1)
    os._exit(0)


def start_ranks(
    size: int, device: torch.device, arguments: Mapping[str, Any], options: EngineOptions, **loader: str
) -> Workers | None:
    """The processes of all ranks but this one; None if it is alone. For the arguments see :class:`.Workers`.

    Where torchrun has started all of them, only the first one returns: the others follow it here, and end.

    Raises:
        OptionError: see there.
    """
    if size == 1:
        return None
    if not started_by_torchrun(size) or int(os.environ["RANK"]) == 0:
        return Workers(size, device, arguments, options, **loader)
    rank = int(os.environ["RANK"])
    device = devices_of(device, size)[rank]
    model = loader_of(**loader)(**arguments, device=device, ranks=join(rank, size, device))
    follow(model, options)
    model.ranks.least(0)  # see workers._end
    dist.destroy_process_group()
    raise SystemExit(0)


def follow(model: Qwen3VLMoe, options: EngineOptions) -> None:
    """Be a rank of an engine."""
    cache, options, max_model_len = prepare(model, options, progress=False)
    executor = Executor(model, cache.tensor, options, max_model_len, workers=None)
    executor.warm_up(progress=False)
    executor.follow()


def loader_of(loader: str = LOADER) -> Callable[..., Any]:
    """The function that a "module:function" names."""
    module, _, function = loader.partition(":")
    return getattr(importlib.import_module(module), function)


def end_with_the_first() -> None:
    """Wait in a thread until the process that started this one ends, or says so; end then."""
    while sys.stdin.buffer.read(1):
        pass
    os._exit(0)
