"""What pip makes of this tree: wheels and an sdist, installed into fresh environments and run from another folder.

The environments borrow the libraries of the one that runs the tests, so that nothing is downloaded; of this project
they hold what was built and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

import command_line
import qwen3vl_moe
import tma_moe

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", ".*_cache", "__pycache__", "build", "data", "*.egg-info"
)
_BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a folder that is not this tree."""

    python: Path
    elsewhere: Path

    def run(self, *command, stdin=None, **variables):
        """(stdout, stderr) of a command, whose first word may be one that was installed."""
        scripts = self.python.parent
        whole = [scripts / command[0] if (scripts / command[0]).exists() else command[0], *map(str, command[1:])]
        environment = clean() | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables
        done = subprocess.run(
            whole, cwd=self.elsewhere, env=environment, input=stdin, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources: builds leave files behind."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("copy") / "tree", ignore=NOT_SOURCE)


def clean():
    """The environment without what leads to this tree or to the test run."""
    mine = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in mine and not name.startswith("PYTEST_")}


def build(folder, kind, target):
    """Build ``wheel`` or ``sdist`` of ``folder`` as pip does, without its isolation, which would need a network."""
    command = [sys.executable, "-c", _BUILD, f"build_{kind}", str(target)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def make_environment(tmp_path_factory):
    def make(wheel):
        folder = tmp_path_factory.mktemp("environment")
        venv.create(folder / "venv", with_pip=False)
        python = folder / "venv" / "bin" / "python"
        site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
        install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)]
        pip = [sys.executable, "-m", "pip", "--python", str(python), *install]
        subprocess.run(pip, check=True, timeout=300, env=clean())
        (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        # As if triton were not installed, where a test asks for that.
        hide = "import os, sys; 'NO_TRITON' in os.environ and sys.modules.update(triton=None)\n"
        (site / "no_triton.pth").write_text(hide)
        (folder / "elsewhere").mkdir()
        return Environment(python, folder / "elsewhere")

    return make


@pytest.fixture(scope="module")
def installed(tree, make_environment, tmp_path_factory):
    """What the wheel makes of an empty environment."""
    return make_environment(build(tree, "wheel", tmp_path_factory.mktemp("wheel")))


# Several commands in one process, as importing torch and transformers takes the most of each; their exit statuses last.
_IN_TURN = """
import json, sys
from qwen3vl_moe_programs.scripts import command_line
statuses = []
for arguments in json.loads(sys.argv[1]):
    try:
        command_line.main(arguments)
        statuses.append(0)
    except SystemExit as ended:
        statuses.append(ended.code or 0)
print("\\nstatuses", statuses)
"""


def test_every_command_of_the_wheel(installed):
    """Each program answers, or says in a line what it needs."""
    run, shapes = installed.run, ROOT / "examples/shapes.png"
    where = "import qwen3vl_moe, tma_moe; print(qwen3vl_moe.__file__); print(tma_moe.__file__)"
    assert str(ROOT) not in run("python", "-c", where)[0]
    assert run("qwen3vl-moe", "--version")[0] == f"qwen3vl-moe {qwen3vl_moe.__version__}\n"
    assert "square" in run("qwen3vl-moe", "chat", stdin=f"/image {shapes}\nWhat shape is blue?\n/exit\n")[0]
    for word in command_line._offered():
        stdout, _ = run("qwen3vl-moe", word, "--help")
        assert f"qwen3vl-moe {word}" in stdout or word == "lm-eval"
    data = ["--data", str(ROOT / "tests/eval/problems"), "--limit", "2", "--num-fewshot", "0", "--max-gen-toks", "16"]
    small = ["--sizes", "64x64", "--text-lens", "8", "--repeats", "1", "--workload", "single", "--json", "ttft.json"]
    both = ["gsm8k", "--model", "demo", *data], ["ttft", "--model", "demo", *small]
    stdout, _ = run("python", "-c", _IN_TURN, json.dumps(both))
    assert stdout.endswith("\nstatuses [0, 0]\n")
    assert "gsm8k, test, 2 problems" in stdout
    environment_of_it = json.loads((installed.elsewhere / "ttft.json").read_text())["environment"]
    assert environment_of_it["command"].startswith("qwen3vl-moe ttft --model demo")
    assert environment_of_it["commit"] is None  # whatever repository the folder may lie in is not ours


def test_the_wheel_without_triton(installed):
    question = ["--image", str(ROOT / "examples/shapes.png"), "--prompt", "What do you see in this picture?"]
    both = ["generate", *question, "--temperature", "0"], ["generate", "--moe", "tma", "--prompt", "Hi"]
    stdout, stderr = installed.run("python", "-c", _IN_TURN, json.dumps(both), NO_TRITON="1")
    answer = "From left to right: a large red circle, a small blue square and a large green triangle.\n"
    assert stdout == f"{answer}\nstatuses [0, 2]\n"
    error = stderr.splitlines()[-1]
    assert error.startswith("error: moe='tma' cannot run here: triton >= 3.6 is needed")


def test_the_kernel_alone(tree, make_environment, tmp_path):
    """A distribution of its own, of the same version, with its tiles and without the model."""
    environment = make_environment(build(tree / "kernels", "wheel", tmp_path))
    code = (
        "import importlib.util, importlib.metadata as m, torch, tma_moe, tma_moe.tiles\n"
        "assert importlib.util.find_spec('qwen3vl_moe') is None\n"
        "experts = tma_moe.ExpertWeights(2, 8, 8, dtype=torch.float32)\n"
        "experts.gate_up.data.normal_(); experts.down.data.normal_()\n"
        "ids, weights = tma_moe.route(torch.randn(3, 2), 1, backend='reference')\n"
        "print(tma_moe.fused_moe(torch.randn(3, 8), ids, weights, experts, backend='reference').shape)\n"
        "print(len(list(m.files('tma-moe'))), m.version('tma-moe'), tma_moe.__version__)\n"
        "print(sorted(r.split('<')[0].split('>')[0] for r in m.requires('tma-moe')))"
    )
    lines = environment.run("python", "-c", code)[0].splitlines()
    files = [p for p in (ROOT / "kernels/tma_moe").rglob("*") if p.suffix in (".py", ".json", ".typed")]
    found, of_metadata, of_package = lines[1].split()
    assert int(found) >= len(files)
    assert of_metadata == of_package == tma_moe.__version__ == qwen3vl_moe.__version__
    assert lines[2] == "['torch', 'triton']"


def test_the_sdist_holds_all_that_its_tests_need(tree, tmp_path):
    with tarfile.open(build(tree, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    [folder] = [path for path in tmp_path.iterdir() if path.is_dir()]
    if (ROOT / ".git").exists():
        names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert not [name for name in names.splitlines() if (ROOT / name).exists() and not (folder / name).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_json_files.py"]
    done = subprocess.run(command, cwd=folder, env=clean(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_versions_are_one():
    """The two distributions hold the same package, and say so."""
    assert tma_moe.__version__ == qwen3vl_moe.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {qwen3vl_moe.__version__}\n" in citation


def test_a_command_whose_file_or_extra_is_missing(monkeypatch, capsys):
    def status_of(*arguments):
        with pytest.raises(SystemExit) as caught:
            command_line.main(list(arguments))
        return caught.value.code, capsys.readouterr().err

    assert status_of("nothing")[0] == 2
    monkeypatch.setitem(command_line.PROGRAMS, "serve", ("scripts/no_such_file.py", "serve", "a server"))
    code, error = status_of("serve")
    assert (code, error.count("\n")) == (2, 1)
    assert "there is no such command; its file scripts/no_such_file.py is not installed" in error
    command_line.main(["--help"])
    shown = capsys.readouterr().out
    assert "generate" in shown
    assert "serve" not in shown
    listed = ["typer>=0.15", 'no-such-thing>=2; extra == "eval"', 'pytest>=8; extra == "test"']
    monkeypatch.setattr(command_line.metadata, "requires", lambda name: listed)
    code, error = status_of("gsm8k", "--limit", "1")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: qwen3vl-moe gsm8k needs no-such-thing: pip install 'qwen3vl-moe[eval]'")
