"""The worker of batch_worker.py as Ray calls it, without Ray: batches of columns, several at a time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from PIL import Image

from batch_worker import PartWorker, Worker
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import UserError
from tests.scripts.batches.conftest import QUESTION, picture

GREEDY = {"temperature": 0, "max_tokens": 4}


@pytest.fixture(scope="module")
def llm(plain):
    return LLM(plain.path, device="cpu", progress=False)


def column(*values):
    made = np.empty(len(values), dtype=object)
    made[:] = values
    return made


def test_rows_keep_their_columns_and_gain_an_answer_or_an_error(llm, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(1))
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    hf = {"bytes": picture(1), "path": None}
    images = column(picture(1), str(tmp_path / "a.png"), hf, pixels, None, b"bad", [picture(1)], 3.5)
    batch = {"prompt": column(QUESTION, *[None] * 6, QUESTION), "image": images, "label": np.arange(8)}
    done = asyncio.run(Worker(lambda: llm, prompt=QUESTION, sampling=GREEDY)(batch))
    assert list(done)[:3] == list(batch)
    assert all(done[name] is batch[name] for name in batch)
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": QUESTION}]
    params = SamplingParams(**GREEDY)
    seen, blind = llm.chat([[{"role": "user", "content": each}] for each in (content, QUESTION)], params)
    for row in (0, 1, 2, 3, 6):
        assert done["text"][row] == seen.outputs[0].text
        assert done["image_tokens"][row] == seen.num_image_tokens > 0
    assert (done["text"][4], done["prompt_tokens"][4]) == (blind.outputs[0].text, len(blind.prompt_token_ids))
    assert [number for number in range(8) if done["error"][number]] == [5, 7]
    assert "is not an image that can be read" in done["error"][5]
    assert done["text"][5] is done["answer_tokens"][7] is None


def test_batches_overlap(llm):
    """Two calls at a time are answered in the same steps: the engine does not wait for the end of a batch."""
    worker = Worker(lambda: llm, prompt="Hi", sampling={**GREEDY, "max_tokens": 60, "ignore_eos": True})
    most, real = 0, llm.engine.step

    def step():
        nonlocal most
        most = max(most, len(llm.engine.scheduler.running))
        return real()

    async def both():
        return await asyncio.gather(*(worker({"n": np.arange(4)}) for _ in range(2)))

    llm.engine.step = step
    try:
        done = asyncio.run(both())
    finally:
        llm.engine.step = real
    assert most > 4
    assert [list(batch["answer_tokens"]) for batch in done] == [[60] * 4] * 2


def test_columns_that_do_not_fit(llm):
    with pytest.raises(UserError, match="the dataset has a column 'text', as answers have; give the worker a prefix"):
        asyncio.run(Worker(lambda: llm, prompt="Hi")({"text": column("a")}))
    with pytest.raises(UserError, match="the dataset has no column 'prompt', and the worker has no prompt"):
        asyncio.run(Worker(lambda: llm)({"label": column("a")}))
    worker = Worker(lambda: llm, prompt="Hi", prefix="our_", sampling=GREEDY)
    assert "our_text" in asyncio.run(worker({"text": column("a")}))


def test_a_model_that_cannot_be_loaded_is_told_of_with_the_first_part():
    """An actor that fails to start would be started again and again."""

    def load():
        return LLM("/no/such/model", device="cpu")

    worker = PartWorker(load)
    assert "/no/such/model" in worker.problem
