"""What README and docs tell people to type: every option exists, what can be run is run, every file is there.

Commands are run in this process on the demo checkpoint and a few rows, wherever that is what they need; those that
need a card are marked (``DOCS_ON_CARD=1 pytest -m gpu tests/test_docs.py`` runs them as they stand, which takes long).
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.weights.source import DEMO
from tests.docs_commands import PAGES, ROOT, Call, calls_of
from tests.inputs.clips import make_clip

OF_LM_EVAL = "eval/lm.py"  # whose options are lm-eval's own
# Programs that tests of their own run, as they take long or need what is not here.
ELSEWHERE = {
    OF_LM_EVAL: "tests/eval/test_command.py",
    "scripts/batch_ray.py": "tests/scripts/batches/test_ray.py",
    "scripts/eval_demo.py": "tests/scripts/demo/test_eval_demo.py",
    "scripts/train_demo.py": "tests/scripts/demo/test_training.py",
}
ON_A_CARD = ("scripts/bench_moe.py", "scripts/bench_hf.py", "scripts/tune_moe.py", "scripts/bench_load.py")
# So that a page takes seconds: what is measured there is not measured here.
FEWER = {"--num-prompts": "2", "--max-concurrency": "2", "--limit": "2", "--max-gen-toks": "8", "--sizes": "64x64"}
ALSO = {
    "scripts/ttft.py": ["--repeats", "1"],
    "scripts/bench_serving.py": ["--rounds", "1", "--num-prompts", "2", "--max-concurrency", "2"],
    "eval/gsm8k.py": ["--limit", "2", "--max-gen-toks", "8", "--data", "FOLDER"],
    "eval/checkpoints.py": ["--limit", "2", "--max-gen-toks", "8", "--data", "FOLDER", "--num-fewshot", "0"],
}
STATUS = {"scripts/draw_boxes.py": 1}  # the demo knows no boxes, as the page says
FEWER_ROWS = {"heldout_examples(400)": "heldout_examples(60)", "[:20]": "[:2]"}
PROBLEMS = ROOT / "tests/eval/problems"


def is_form(call: Call) -> bool:
    """Whether it only shows where things stand, or is a name in a sentence."""
    return bool({"...", "MODEL", "INPUT", "OUTPUT"} & {*call.arguments}) or call.named


def needs_card(call: Call) -> bool:
    dummy = any(word.startswith("dummy") for word in call.arguments) and "--model" not in call.arguments
    return dummy or call.program in ON_A_CARD or any(re.search(r"\btma\b", word) for word in call.arguments)


def docstrings():
    for path in sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("eval/*.py")]):
        yield path, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


OF_PAGES = {page: list(dict.fromkeys(calls_of(page.read_text(encoding="utf-8")))) for page in PAGES}
OF_PROGRAMS = {path: list(dict.fromkeys(calls_of(text))) for path, text in docstrings()}
ALL = [
    pytest.param(call, id=f"{page.name}: {call}")
    for page, calls in (OF_PAGES | OF_PROGRAMS).items()
    for call in calls
    if call.program
]
RUN = {
    page: [call for call in calls if not is_form(call) and not needs_card(call) and call.program not in ELSEWHERE]
    for page, calls in OF_PAGES.items()
}
CARD = sorted(
    {call for calls in OF_PAGES.values() for call in calls if needs_card(call) and not is_form(call)}, key=str
)


def app_of(file):
    module = importlib.import_module(Path(file).stem)
    if hasattr(module, "app"):
        return module.app
    app = typer.Typer()
    app.command()(module.main)
    return app


@pytest.mark.parametrize("call", ALL)
def test_every_command_is_understood(call):
    assert (ROOT / call.program).is_file()
    if call.program == OF_LM_EVAL or "..." in call.arguments or not call.arguments:
        return
    program = typer.main.get_command(app_of(call.program))
    required = [p for p in program.params if p.param_type_name == "argument" and p.required]
    if "--help" not in call.arguments and len(call.arguments) >= len(required):
        program.make_context(call.program, list(call.arguments))  # raises for what it does not know


def test_every_program_has_its_tests():
    assert all(Path(program).stem in (ROOT / file).read_text() for program, file in ELSEWHERE.items())
    assert sum(map(len, RUN.values())) > 30  # a page's blocks are found
    assert len(CARD) > 10


@pytest.fixture(scope="module")
def fp8_demo(tmp_path_factory):
    """The demo in FP8, as its program makes it."""
    folder = tmp_path_factory.mktemp("fp8") / "demo"
    done = CliRunner().invoke(app_of("scripts/quantize.py"), [str(DEMO), str(folder), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with what pages name, to be in."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "cat.jpg").symlink_to(ROOT / "examples/cat.jpg")
    (tmp_path / "walk.mp4").write_bytes(make_clip())
    (tmp_path / "problems").mkdir()
    for path in PROBLEMS.iterdir():  # too few for five examples before each
        (tmp_path / "problems" / path.name).write_text(2 * path.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def filled_in(call, fp8):
    """The arguments of a call with what its names stand for here, and little to do."""
    names = {"DIR": str(DEMO), "DEMO": str(DEMO), "DIR_FP8": str(fp8), "FOLDER": "problems", "FILE": "figures.json"}
    names["Qwen/Qwen3-VL-30B-A3B-Instruct"] = "demo"
    words, also = [*call.arguments], ALSO.get(call.program, [])
    for name, value in zip(also[::2], also[1::2], strict=True):
        words += [] if name in words else [name, value]
    words = [FEWER.get(before, names.get(word, word)) for before, word in zip(["", *words], words, strict=False)]
    if call.program == "scripts/quantize.py" and "--check" not in words:
        words[1] = "made"
    if call.program == "scripts/serve.py":
        words += ["--port", "0"]
    known = [option for each in typer.main.get_command(app_of(call.program)).params for option in each.opts]
    return [*words, "--device", "cpu"] if "--device" in known and "--device" not in words else words


@pytest.fixture
def started(monkeypatch):
    """Servers end as soon as they serve; lm-eval does not ask compilers for their versions."""
    run = pytest.importorskip("qwen3vl_moe.server.run", reason="the extra serve is not installed")
    make, served = run.Server.__init__, []

    def made(server, *arguments, **named):
        if named:  # not of serve.py
            return make(server, *arguments, **named)
        *others, say = arguments

        def said(line):
            say(line)
            if line.startswith("serving"):
                served.append(line)
                server.stop()

        return make(server, *others, said)

    monkeypatch.setattr(run.Server, "__init__", made)
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="lm-eval is not installed")
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    return served


@pytest.mark.parametrize("page", [page for page, calls in RUN.items() if calls], ids=lambda page: page.name)
def test_the_commands_of_a_page_do_what_they_say(page, workspace, fp8_demo, started, monkeypatch):
    """In their order, on the demo and the CPU."""
    for call in RUN[page]:
        if call.code:
            code = call.code
            for what, instead in FEWER_ROWS.items():
                code = code.replace(what, instead)
            exec(compile(code, page.name, "exec"), {"__name__": "__main__"})
            continue
        words = filled_in(call, fp8_demo)
        monkeypatch.setattr(sys, "argv", [call.program, *words])
        done = CliRunner().invoke(app_of(call.program), words, input="What word is written?\n")
        assert done.exit_code == STATUS.get(call.program, 0), f"{call}\n{done.output}"
        said = started.pop() if call.program == "scripts/serve.py" else done.output
        assert said, call
        for place, word in enumerate(words):
            if word in ("--output", "--json", "--plot", "--trace", "--timeline") and not done.exit_code:
                assert Path(words[place + 1]).exists(), call


@pytest.mark.gpu
@pytest.mark.skipif("DOCS_ON_CARD" not in os.environ, reason="DOCS_ON_CARD=1: minutes each, on an 80 GB card")
@pytest.mark.parametrize("call", CARD, ids=str)
def test_what_needs_a_card(call, workspace):
    """As it stands; DIR is what DOCS_ON_CARD names, if it is a checkpoint's directory."""
    given = os.environ["DOCS_ON_CARD"]
    if "DIR" in call.arguments and not Path(given).is_dir():
        pytest.skip("DOCS_ON_CARD=DIR: the directory of a checkpoint")
    names = {"DIR": given, "FOLDER": "problems", "FILE": "figures.json", "docs/moe.png": "moe.png"}
    command = [sys.executable, ROOT / call.program, *(names.get(word, word) for word in call.arguments)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


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
