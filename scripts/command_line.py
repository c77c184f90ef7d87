"""The command ``qwen3vl-moe``: each of its words starts a program of this folder or of eval/, as python would.

    qwen3vl-moe generate --model demo --prompt "What can you do?"      # python scripts/generate.py --model demo ...
    qwen3vl-moe generate --help

What pip installs are copies of these folders, side by side as they are here, so both ways run the same code.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

DISTRIBUTION, COMMAND = "qwen3vl-moe", "qwen3vl-moe"
# The file of each word, the extra that it needs, and what it is for; words whose file is not there are not offered.
PROGRAMS = {
    "generate": (
        "scripts/generate.py",
        "",
        "ask a question, with pictures, videos or without, or answer a file of requests",
    ),
    "chat": ("scripts/chat.py", "", "talk with the model, with pictures at any turn"),
    "serve": ("scripts/serve.py", "serve", "an HTTP server with OpenAI's API, and a page"),
    "check": (
        "scripts/check.py",
        "",
        "what this machine is, which kernels run on it, whether they are right, what fits",
    ),
    "gsm8k": ("eval/gsm8k.py", "eval", "accuracy and speed on gsm8k"),
    "parity": ("eval/parity.py", "eval", "whether fast and plain kernels, and transformers, answer equally well"),
    "checkpoints": ("eval/checkpoints.py", "eval", "two checkpoints beside each other, such as bf16 and FP8"),
    "lm-eval": ("eval/lm.py", "eval", "lm-eval's own command with --model qwen3vl_moe"),
    "ttft": ("scripts/ttft.py", "", "time to first token, alone and under load, with figures and timelines"),
    "quantize": ("scripts/quantize.py", "", "make an FP8 checkpoint"),
}


def main(arguments: list[str] | None = None) -> None:
    """Start the program that the first argument names, with the others as its own.

    Ends as that program does; with status 2 and one line where there is no such word or its extra is not installed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    word = given[0] if given else "--help"
    if word in ("--help", "-h", "help"):
        print(_help())
        return
    if word in ("--version", "-V"):
        print(f"{DISTRIBUTION} {_version()}")
        return
    offered = _offered()
    if word not in offered:
        hint = f"; its file {PROGRAMS[word][0]} is not installed" if word in PROGRAMS else ""
        _refuse(f"{COMMAND} {word!a}: there is no such command{hint}; there are {', '.join(offered)}")
    file, extra, _ = PROGRAMS[word]
    missing = _missing(extra) if extra and not {"--help", "-h"} & set(given[1:]) else []
    if missing:
        _refuse(
            f"{COMMAND} {word} needs {', '.join(missing)}: pip install '{DISTRIBUTION}[{extra}]', or in a clone "
            f"pip install '.[{extra}]'"
        )
    path = _root() / file
    # As python does for a script; but --help shows the command (runpy would put the path into sys.argv).
    sys.path.insert(0, str(path.parent))
    sys.argv = [f"{COMMAND} {word}", *given[1:]]
    sys.modules["__main__"] = program = ModuleType("__main__")
    program.__file__ = str(path)
    exec(compile(path.read_bytes(), path, "exec"), vars(program))


def _root() -> Path:
    """The folder that holds scripts/ and eval/: of a clone, or that of the installed package of programs."""
    return Path(__file__).resolve().parents[1]


def _offered() -> dict[str, str]:
    """The words whose programs are there, and what each is for."""
    return {word: what for word, (file, _, what) in PROGRAMS.items() if (_root() / file).is_file()}


def _help() -> str:
    offered = _offered()
    width = max(map(len, offered))
    lines = [f"  {word:<{width}}  {what}" for word, what in offered.items()]
    usage = f"Usage: {COMMAND} COMMAND [OPTIONS]     {COMMAND} COMMAND --help     {COMMAND} --version"
    return "\n".join([usage, "", "Commands:", *lines])


def _version() -> str:
    from qwen3vl_moe import __version__  # which imports nothing else

    return __version__


def _missing(extra: str) -> list[str]:
    """Which distributions of an extra are not installed; none where this is not known, as in a clone on its own."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return []
    wanted = [each for each in listed if each.marker and not each.marker.evaluate({"extra": ""})]
    wanted = [each for each in wanted if each.marker and each.marker.evaluate({"extra": extra})]
    return [each.name for each in wanted if not _installed(each)]


def _installed(requirement: Any) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _refuse(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    from program import any_text

    any_text()
    main()
