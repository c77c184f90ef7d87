"""Processors shared by these tests: a tiny one, and the published one where the shared folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.inputs.processor import Processor
from tests.inputs.parts import make


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("processor")


@pytest.fixture(scope="module")
def processor(directory) -> Processor:
    return make(directory)


@pytest.fixture(scope="module")
def published(shared_dir) -> Processor:
    return Processor.from_pretrained(shared_dir / "qwen3vl-tokenizer", Qwen3VLMoeConfig.qwen3_vl_30b_a3b())
