"""The commands that README and docs tell people to type, as a shell reads them."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import command_line

ROOT = Path(__file__).resolve().parents[1]
FIRST = [ROOT / "README.md", ROOT / "examples/README.md"]
PAGES = [*FIRST, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BEGINS = r"(?:\w+=\S* )?(?:python (?:scripts/|eval/|- |-c )|qwen3vl-moe [a-z-])"
_COMMAND = re.compile(rf"{_BEGINS}.*", re.S)
# Only what is written down is done: with no PATH the shell finds no other program.
_SHELL = r"""
python() { { printf '%s\0' "$@"; if [ "$1" = - ]; then IFS= read -r -d '' code; printf '%s\0' "$code"; fi
  printf '\1\0'; } >&3; }
qwen3vl-moe() { python qwen3vl-moe "$@"; }
"""


@dataclass(frozen=True)
class Call:
    """One program that is started.

    Attributes:
        program: the file of ours that is run, or "" for code of the page's own.
        arguments: of it.
        code: of the page's own.
        named: it is a name in a sentence, such as "`python scripts/check.py`", rather than something to type.
    """

    program: str
    arguments: tuple[str, ...]
    code: str = ""
    named: bool = False

    def __str__(self) -> str:
        return shlex.join((self.program, *self.arguments)) if self.program else "code"


def calls_of(text: str) -> list[Call]:
    """All of them in a page, or in the docstring of a program, in their order."""
    found: list[Call] = []
    prose, block, inside = [], [], None
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            if inside == "" and any(_COMMAND.match(each) for each in block):
                found += _as_typed("\n".join(block))
            inside, block = (line[3:] if inside is None else None), []
        elif inside is not None:
            block.append(line)
        elif re.match(rf"    {_BEGINS}", line) or (block and line.startswith("     ")):
            block.append(line[4:])  # an indented block
        else:
            if block:
                found += _as_typed("\n".join(block))
                block = []
            prose.append(line)
    for code in re.findall(r"`([^`]+)`", "\n".join(prose)):
        if _COMMAND.match(code):
            for call in _as_typed(" ".join(code.split())):
                found.append(Call(call.program, call.arguments, call.code, named=not call.arguments))
    return found


def _as_typed(script: str) -> list[Call]:
    """The calls that a shell makes of some lines."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "calls", "wb") as calls:
        command = ["/bin/bash", "-c", f"exec 3>>{calls.name}\n{_SHELL}{script}"]
        done = subprocess.run(command, cwd=folder, env={"PATH": ""}, capture_output=True, text=True, timeout=60)
        assert "syntax error" not in done.stderr, f"{done.stderr}\n{script}"
        words = Path(calls.name).read_bytes().decode().split("\0\1\0")[:-1]
    found = []
    for word in words:
        first, *arguments = word.split("\0")
        if first == "-" or first == "-c":
            found.append(Call("", (), arguments[-1]))
        elif first == "qwen3vl-moe":
            if arguments[0] in command_line.PROGRAMS:
                found.append(Call(command_line.PROGRAMS[arguments[0]][0], tuple(arguments[1:])))
        elif first.startswith(("scripts/", "eval/")):
            found.append(Call(first, tuple(arguments)))
    return found
