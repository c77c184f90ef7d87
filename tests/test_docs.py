"""What README and docs tell people to type: every option exists, what the demo can do is run, every file is there."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import command_line
from qwen3vl_moe import LLM, SamplingParams

ROOT = Path(__file__).resolve().parents[1]
FIRST = [ROOT / "README.md", ROOT / "examples/README.md"]
PAGES = [*FIRST, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_COMMAND = re.compile(r"(?:python (?:scripts|eval)/\w+\.py|qwen3vl-moe [a-z]\w*(?:-\w+)?)(?: .*)?")
OF_LM_EVAL = "eval/lm.py"  # whose options are lm-eval's own


def commands(page):
    """Each command of a page: lines of code blocks, and code within a sentence."""
    text, found = page.read_text(encoding="utf-8"), []
    for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S):
        found += [line for line in block.replace("\\\n", " ").splitlines() if _COMMAND.match(line)]
    inline = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return found + [code for code in re.findall(r"`([^`]+)`", inline) if _COMMAND.fullmatch(code.replace("\n", " "))]


def split(command):
    """The file of a command's program, and its arguments."""
    words = shlex.split(command.replace("[", "").replace("]", ""), comments=True)
    words = words[: words.index("|")] if "|" in words else words
    first, second, *arguments = words
    return (second if first == "python" else command_line.PROGRAMS[second][0]), arguments


def app_of(file):
    module = importlib.import_module(Path(file).stem)
    if hasattr(module, "app"):
        return module.app
    app = typer.Typer()
    app.command()(module.main)
    return app


ALL = [
    pytest.param(command, id=f"{page.name}: {command}") for page in PAGES for command in dict.fromkeys(commands(page))
]
RUN = sorted({command for page in FIRST for command in commands(page) if "--model demo" in command})


@pytest.mark.parametrize("command", ALL)
def test_every_command_is_understood(command):
    file, arguments = split(command)
    assert (ROOT / file).is_file()
    if file == OF_LM_EVAL or "..." in arguments or not arguments:
        return
    program = typer.main.get_command(app_of(file))
    required = [p for p in program.params if p.param_type_name == "argument" and p.required]
    if "--help" not in arguments and len(arguments) >= len(required):
        program.make_context(file, list(arguments))  # raises for what it does not know


@pytest.mark.parametrize("command", [c for c in RUN if "generate" in c or "chat" in c])
def test_what_the_demo_can_do_is_run(command, tmp_path, monkeypatch):
    file, arguments = split(command)
    arguments = [str(tmp_path / word) if word == "answers.jsonl" else word for word in arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [file, *arguments])
    done = CliRunner().invoke(app_of(file), arguments, input="What word is written?\n")
    assert done.exit_code == 0, done.output
    assert done.stdout or (tmp_path / "answers.jsonl").exists()


def test_the_ten_questions_are_answered_as_the_page_says():
    page = (ROOT / "examples/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ?(.*?) ?\| (.*?) \| (.*?) \|$", page, re.M)
    lines = (ROOT / "examples/requests.jsonl").read_text(encoding="utf-8").splitlines()
    requests = [json.loads(line) for line in lines]
    assert [(int(number), question) for number, _, question, _ in rows] == [(r["id"], r["prompt"]) for r in requests]
    chats = []
    for request, (_, pictures, _, _) in zip(requests, rows, strict=True):
        names = request.get("images", [request["image"]] if "image" in request else [])
        assert ", ".join(name.removesuffix(".png") for name in names) == pictures.strip()
        content = [{"type": "image", "image": ROOT / "examples" / name} for name in names]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": request["prompt"]}]}])
    outputs = LLM("demo", device="cpu", progress=False).chat(chats, SamplingParams(temperature=0, max_tokens=64))
    assert [output.outputs[0].text for output in outputs] == [answer for *_, answer in rows]


def test_the_notebook_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples/quickstart.ipynb", 4)
    resources = {"metadata": {"path": str(ROOT / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert "From left to right: a large red circle" in notebook.cells[3].outputs[0].text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every page and picture that a page names is in the clone."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
