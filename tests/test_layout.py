"""The house: arrows between packages run one way, and the repository root does not shadow other libraries."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> str:
    """What a fresh interpreter prints, run from the repository root."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/tma_moe", "qwen3vl_moe"),
        ("qwen3vl_moe/model", "qwen3vl_moe.engine"),
        ("qwen3vl_moe", "transformers.models"),
        ("qwen3vl_moe", "torchvision"),
        ("kernels/tma_moe", "transformers.models"),
    ],
)
def test_arrows_run_one_way(folder, forbidden):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        wrong = {name for name in imports_of(path) if name == forbidden or name.startswith(forbidden + ".")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


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


def test_no_file_is_too_long_to_read():
    for folder, most in (("qwen3vl_moe", 400), ("kernels", 400), ("scripts", 400), ("eval", 400), ("tests", 450)):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= most, f"{path.relative_to(ROOT)} has {lines} lines: a file holds one idea"


def test_every_package_is_installed():
    """An editable install would find one that the list leaves out; a wheel would not."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = [("qwen3vl_moe", ROOT), ("kernels/tma_moe", ROOT / "kernels")]
    found = [
        ".".join(path.parent.relative_to(base).parts)
        for folder, base in folders
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert set(found) <= set(listed)
    assert all((ROOT / name.replace(".", "/")).is_dir() or name.startswith("tma_moe") for name in listed)


def test_every_file_of_the_demo_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folder = ROOT / "qwen3vl_moe" / "demo"
    installed = {path for pattern in listed["qwen3vl_moe.demo"] for path in folder.glob(pattern)}
    files = {path for path in folder.rglob("*") if path.is_file()}
    assert files
    assert files <= installed


def test_the_engine_stays_small():
    files = (ROOT / "qwen3vl_moe/engine").glob("*.py")
    lengths = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    assert sum(lengths) < 1500
    assert max(lengths) <= 400


def test_what_goes_in_and_comes_out_knows_nothing_of_the_engine():
    for name in ("params", "outputs", "detokenizer", "processor", "prefetch"):
        assert not any("engine" in module for module in imports_of(ROOT / "qwen3vl_moe" / f"{name}.py"))
