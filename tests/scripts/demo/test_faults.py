"""Planted faults: each changes what the model computes, and leaves it as it was."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

import eval_demo
from demo_training.evaluation import new_conversation, new_heldout
from demo_training.faults import FAULTS, experts_of_bits, measure, rounded
from demo_training.heldout_phrases import KINDS, OF_POSITIONS
from qwen3vl_moe.engine import LLM


@pytest.fixture(scope="module")
def llm(untrained):
    return LLM(untrained[0], device="cpu", dtype="float32", progress=False)


@pytest.fixture(scope="module")
def prompt(llm):
    """Token ids, patches and grids of a question about two pictures."""
    asked = new_heldout(len(KINDS))[KINDS.index("cell in one of two")]
    prompt = llm.processor.chat(new_conversation(asked))
    patches = torch.cat([image.pixel_values for image in prompt.images])
    return prompt.token_ids, patches, [image.grid_thw for image in prompt.images]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_changes_logits_and_is_gone_afterwards(llm, prompt, fault):
    whole = llm.engine.model.logits(*prompt)
    with fault.plant(llm):
        broken = llm.engine.model.logits(*prompt)
    assert (broken - whole).abs().max() > 1e-4 * whole.abs().max()
    assert torch.equal(llm.engine.model.logits(*prompt), whole)


def test_significands_are_rounded_to_so_many_bits():
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, 1.0, -1.5, 3e-5])])
    near = (rounded(x, 8) - x.bfloat16().float()).abs()
    assert (near <= 2**-8 * x.abs()).all()  # ties may go the other way
    assert (near > 0).sum() < 10
    for bits in (3, 7):
        y = rounded(x, bits)
        assert ((y - x).abs() <= 2.0**-bits * x.abs()).all()
        mantissa, _ = torch.frexp(y)
        assert torch.equal(mantissa * 2**bits, (mantissa * 2**bits).round())


def test_fewer_bits_err_more(llm, prompt):
    whole, errors = llm.engine.model.logits(*prompt), []
    for bits in (10, 8, 6, 4):
        with experts_of_bits(llm, bits):
            errors.append(float((llm.engine.model.logits(*prompt) - whole).norm()))
    assert errors == sorted(errors)


def test_changed_answers_are_counted_of_the_kinds_that_a_fault_is_about(llm):
    asked = new_heldout(len(KINDS))
    faults = [FAULTS[0], next(fault for fault in FAULTS if fault.of == "positions")]
    table = measure(llm, asked, faults)
    assert [cell["of"] for cell in table.values()] == [len(KINDS), len(OF_POSITIONS)]
    assert all(0 <= cell["changed"] <= cell["of"] for cell in table.values())


def test_wrong_calls_are_one_line(tmp_path):
    for options, message in ((["--faults"], "--new 230"), (["--faults", "--new", "1", "--device", "cpu"], "--device")):
        done = CliRunner().invoke(eval_demo.app, ["--model", str(tmp_path), *options])
        assert done.exit_code == 2
        assert message in done.stderr
