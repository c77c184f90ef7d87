"""The programs in eval/ import each other as python lets them: from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from qwen3vl_moe import LLM
from qwen3vl_moe.weights.source import DEMO

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "eval"))
pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """lm-eval asks pip and the compilers for their versions after each run: seconds, for a text in the result file."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(scope="session")
def problems_dir() -> Path:
    """A few problems of our own in gsm8k's form."""
    return Path(__file__).parent / "problems"


@pytest.fixture(scope="session")
def demo() -> SimpleNamespace:
    """What "demo" stands for: its directory, our engine in fp32, and transformers' own model."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    return SimpleNamespace(
        path=DEMO,
        llm=LLM("demo", device="cpu", dtype="float32", progress=False),
        oracle=AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
    )


def run_program(app, *arguments) -> SimpleNamespace:
    """Run a typer program in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return SimpleNamespace(code=result.exit_code, out=result.stdout, err=result.stderr)


def instance(*arguments) -> SimpleNamespace:
    """A request as lm-eval hands it to a model."""
    return SimpleNamespace(args=arguments)
