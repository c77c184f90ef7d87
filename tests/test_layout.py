"""The house: arrows between packages run one way, and the repository root does not shadow other libraries."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qwen3vl_moe

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    """What a fresh interpreter prints, run from the repository root."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> dict[str, Path]:
    """Every module of the two packages, by its full name."""
    found = {}
    for package, base in (("qwen3vl_moe", ROOT), ("tma_moe", ROOT / "kernels")):
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# Which rooms a room may import from, beside itself and other libraries.
MAY_IMPORT = {
    "tma_moe": set(),
    "qwen3vl_moe.errors": set(),
    "qwen3vl_moe.json_files": {"qwen3vl_moe.errors"},
    "qwen3vl_moe.quantization": {"qwen3vl_moe.errors"},
    "qwen3vl_moe.config": {"qwen3vl_moe.errors", "qwen3vl_moe.json_files", "qwen3vl_moe.quantization"},
    "qwen3vl_moe.ops": {"tma_moe"},
}
MAY_IMPORT["qwen3vl_moe.model"] = {"qwen3vl_moe.ops", "qwen3vl_moe.config", "tma_moe"}
_READERS = {"qwen3vl_moe.config", "qwen3vl_moe.errors", "qwen3vl_moe.json_files", "qwen3vl_moe.model"}
MAY_IMPORT["qwen3vl_moe.weights"] = {*_READERS, "qwen3vl_moe.ops", "tma_moe"}
MAY_IMPORT["qwen3vl_moe.inputs"] = {*_READERS, "qwen3vl_moe.ops"}
MAY_IMPORT["qwen3vl_moe.engine"] = {*_READERS, "qwen3vl_moe.ops", "qwen3vl_moe.inputs", "qwen3vl_moe.weights"}
MAY_IMPORT["qwen3vl_moe.server"] = {
    *("qwen3vl_moe.engine", "qwen3vl_moe.inputs", "qwen3vl_moe.errors", "qwen3vl_moe.json_files")  # at the edge
}
MAY_IMPORT["qwen3vl_moe"] = {"qwen3vl_moe.config", "qwen3vl_moe.engine", "qwen3vl_moe.weights"}  # the face


def room_of(module: str) -> str:
    return next((room for room in sorted(MAY_IMPORT, key=len, reverse=True) if f"{module}.".startswith(f"{room}.")), "")


@pytest.mark.parametrize("module", sorted(modules()))
def test_arrows_run_one_way(module):
    room, names = room_of(module), {name for name in imports_of(modules()[module]) if name in modules()}
    # `from package import module` reads as the package too, whose face any file may name.
    wrong = {name for name in names if name != "qwen3vl_moe" and room_of(name) not in {room, *MAY_IMPORT[room]}}
    assert not wrong


def test_nothing_imports_in_a_circle():
    everything = modules()
    faces = {name for name, path in everything.items() if path.name == "__init__.py"}  # they only hand names on
    arrows = {
        name: {to for to in imports_of(path) if to in everything and to != name and to not in faces}
        for name, path in everything.items()
        if name not in faces
    }
    while arrows:
        ends = [name for name, to in arrows.items() if not to & arrows.keys()]
        assert ends, f"in circles, or above them: {sorted(arrows)}"
        for name in ends:
            del arrows[name]


@pytest.mark.parametrize("library", ["transformers.models", "torchvision"])
def test_what_is_installed_leaves_these_alone(library):
    for name, path in modules().items():
        assert not {imported for imported in imports_of(path) if f"{imported}.".startswith(f"{library}.")}, name
        assert not re.search(r"from transformers import .*Qwen[23]VL", path.read_text(encoding="utf-8")), name


def test_the_model_knows_no_device_and_no_kernel():
    for path in (ROOT / "qwen3vl_moe/model").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        # An import within a function would hide an arrow.
        found = re.findall(
            r"is_cuda|device\.type|takes_kernels|Uncombined|import triton|^[ \t]+from .* import", text, re.M
        )
        assert not found, f"{path.name}: {found}"


def test_transformers_modelling_code_imports_from_the_repository_root():
    """A regular package named ``kernels`` here would hide the distribution of that name, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe as m\n"
        "print(m.Qwen3VLMoeForConditionalGeneration.__name__)"
    )
    assert python(code) == "Qwen3VLMoeForConditionalGeneration"


def test_importing_the_package_imports_no_transformers_models():
    code = (
        "import sys, qwen3vl_moe\n"
        "from qwen3vl_moe import LLM\n"
        "print([m for m in sys.modules if m.startswith('transformers.models.qwen3_vl')])"
    )
    assert python(code) == "[]"


def test_importing_the_package_imports_nothing_slow():
    """Programs import it before they answer --help."""
    code = "import sys, qwen3vl_moe; print(qwen3vl_moe.__version__, [m for m in sys.modules if m in %r])"
    version = re.search(r'__version__ = "(.*)"', (ROOT / "qwen3vl_moe/__init__.py").read_text(encoding="utf-8"))[1]
    assert python(code % ["torch", "transformers", "numpy", "PIL"]) == f"{version} []"


def test_another_rank_imports_neither_tokenizers_nor_what_reads_pictures():
    """Its process starts in two thirds of the time."""
    code = (
        "import sys, qwen3vl_moe.engine.follower, qwen3vl_moe.weights\n"
        "print([m for m in sys.modules if m in ('transformers', 'tokenizers', 'qwen3vl_moe.inputs')])"
    )
    assert python(code) == "[]"


def test_the_demo_answers_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"  # as if it were not installed
        "from qwen3vl_moe import LLM, SamplingParams\n"
        "chat = [{'role': 'user', 'content': 'Hello'}]\n"
        "print(LLM(device='cpu', progress=False).chat(chat, SamplingParams(temperature=0))[0].outputs[0].text)"
    )
    assert python(code) == "Hello! Ask me about a picture."


def test_public_names_are_imported_when_used():
    code = (
        "import qwen3vl_moe as q; print(callable(q.Qwen3VLMoe.from_pretrained), "
        "[getattr(q, name) is vars(q)[name] for name in q.__all__])"
    )
    assert python(code) == f"True {[True] * len(qwen3vl_moe.__all__)}"
    with pytest.raises(AttributeError, match="no attribute 'Lmm'"):
        _ = qwen3vl_moe.Lmm


def test_no_file_is_too_long_to_read():
    for folder, most in (("qwen3vl_moe", 400), ("kernels", 400), ("scripts", 400), ("eval", 400), ("tests", 450)):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines: a file holds one idea"


def test_every_package_is_installed():
    """An editable install would find one that the list leaves out; a wheel would not."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed, moved = setuptools["packages"], setuptools["package-dir"]
    folders = {ROOT / moved.get(name, name.replace(".", "/")) for name in listed}
    roots = ("qwen3vl_moe", "kernels/tma_moe", "scripts", "eval")
    found = {path.parent for root in roots for path in (ROOT / root).rglob("*.py")}
    assert found <= folders
    assert all(folder.is_dir() for folder in folders)


def test_every_file_of_the_demo_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folder = ROOT / "qwen3vl_moe" / "demo"
    installed = {path for pattern in listed["qwen3vl_moe.demo"] for path in folder.glob(pattern)}
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert files
    assert files <= installed
