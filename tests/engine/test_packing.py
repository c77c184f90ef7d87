"""Every batch of random schedules against a plain oracle that looks at one token after the other."""

import random
from collections import Counter

import pytest

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.engine.packing import Packer
from tests.engine.conftest import PROMPTS, check_leaks, mixed_prompt
from tests.engine.test_interrupts import Interrupter

SHARED = "Hello, how are you today? Answer in"
ITEMS = [
    *PROMPTS.values(),
    SHARED,
    SHARED + " one word",
    SHARED + " two or three words",
    [7, 8, 9],
    [5],
    list(range(20, 52)),
    mixed_prompt((40, 30), text=SHARED, seed=1),
]
SIZES = [  # the last ones are so tight that answers lose their blocks
    {"block_size": 16, "num_blocks": 64, "max_prefill_tokens": 64},
    {"block_size": 3, "num_blocks": 90, "max_prefill_tokens": 7},
    {"block_size": 5, "num_blocks": 36, "max_prefill_tokens": 32},
    {"block_size": 1, "num_blocks": 150, "max_prefill_tokens": 50},
]


def row_by_row(chunks, block_size):
    """Of each row of a step: its sequence's number, position, cache row, and features if it is of an image."""
    for number, chunk in enumerate(chunks):
        sequence, prompt = chunk.sequence, chunk.sequence.prompt
        for place in range(chunk.start, chunk.stop):
            behind = place - len(prompt.token_ids)
            position = prompt.positions_3T[:, place].tolist() if behind < 0 else [prompt.next_position + behind] * 3
            slot = sequence.block_table[place // block_size] * block_size + place % block_size
            features = None
            for image, of_image in zip(prompt.images, sequence.features, strict=True):
                if 0 <= place - image.start < image.num_tokens:
                    features = of_image.rows(place - image.start, place - image.start + 1)
            yield number, place, position, slot, features


class Checked:
    """Stands for ``Packer.pack`` of one engine; every batch is compared before the model gets it."""

    def __init__(self, packer: Packer, seen: Counter):
        self.packer, self.size, self.seen = packer, packer._block_size, seen
        self.later = []  # ids that only the device knew: (sequence, place, id)

    def __call__(self, chunks, logit_rows, sampled_T):
        kept = self.packer._decoding
        batch = Packer.pack(self.packer, chunks, logit_rows, sampled_T)
        self.seen["kept"] += kept is not None and self.packer._decoding is kept
        rows = list(row_by_row(chunks, self.size))
        places = [(chunks[number].sequence, place) for number, place, *_ in rows]
        assert batch.positions_3T.T.tolist() == [row[2] for row in rows]
        assert batch.slots_T.tolist() == [row[3] for row in rows]
        assert len(set(batch.slots_T.tolist())) == len(rows)
        ids = batch.input_ids_T.tolist()
        if sampled_T is None:
            assert ids == [sequence.token_ids[place] for sequence, place in places]
        self.later += [(*place, token) for place, token in zip(places, ids, strict=True)]
        assert batch.logit_rows.tolist() == logit_rows
        assert batch.segments.q_lens == tuple(chunk.stop - chunk.start for chunk in chunks)
        assert batch.segments.kv_lens == tuple(chunk.stop for chunk in chunks)
        for chunk, row in zip(chunks, batch.segments.block_tables.tolist(), strict=True):
            blocks = -(-chunk.stop // self.size)
            assert row[:blocks] == chunk.sequence.block_table[:blocks]
        self.check_images(batch.visual, rows)
        return batch

    def check_images(self, visual, rows):
        expected = [(at, row[-1]) for at, row in enumerate(rows) if row[-1] is not None]
        assert [at for at, _ in expected] == ([] if visual is None else visual.rows_M.tolist())
        for number, (_, features) in enumerate(expected):
            assert visual.embeds_MH[number].equal(features.embeds_MH[0])
            assert visual.deepstack_LMH[:, number].equal(features.deepstack_LMH[:, 0])
        self.seen["cut images"] += len(expected)


def params(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 1.0]),
        seed=rng.randrange(100),
        max_tokens=rng.choice([1, 2, 9, 30]),
        ignore_eos=True,
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]),
    )


def run(llm, rng, prompts, seen):
    """Requests that come and go while steps are taken, some of them broken off; all that was asked, all answered."""
    engine = llm.engine
    checked = engine.runner._packer.pack = Checked(engine.runner._packer, seen)
    asked, given_up = [], set()
    while len(asked) < 14 or engine.scheduler.running or engine.scheduler.waiting:
        event = rng.random()
        if event < 0.35 and len(asked) < 14:
            asked.append(engine.request(rng.choice(prompts), params(rng)))
            engine.add(asked[-1])
        elif event < 0.38 and asked:
            given_up.add(sequence := rng.choice(asked))
            engine.abort(sequence)
        elif event < 0.42:
            seen["interrupts"] += Interrupter(rng.randint(1, 500)).run(lambda _: engine.step(), llm)
        else:
            engine.step()
    engine.settle()  # as a call does that was interrupted
    for sequence, place, token_id in checked.later:
        assert place >= len(sequence.token_ids) or sequence.token_ids[place] == token_id
    seen["preemptions"] += sum(sequence.metrics.num_preemptions for sequence in asked)
    seen["found in the cache"] += engine.scheduler.num_cached_tokens
    check_leaks(llm)
    return [sequence for sequence in asked if sequence not in given_up]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_batch_is_that_of_the_oracle(plain, make_llm, sizes, ahead):
    llm, seen = make_llm(plain, async_scheduling=ahead, max_num_seqs=6, **sizes), Counter()
    prompts = [llm.processor.prompt(item) for item in ITEMS]
    answered = [s for seed in range(3) for s in run(llm, random.Random(f"{sizes} {seed}"), prompts, seen)]
    assert all(seen[kind] for kind in ("kept", "cut images", "interrupts", "found in the cache")), seen
    if sizes is not SIZES[0]:
        assert seen["preemptions"], seen
    # In any company, and whatever was taken from them meanwhile, the answers are those of a request that is alone.
    roomy = make_llm(plain, enable_prefix_caching=False, async_scheduling=False).engine
    for sequence in answered[::5]:
        alone = roomy.request(sequence.prompt, sequence.params)
        roomy.add(alone)
        while not alone.finished:
            roomy.step()
        assert sequence.output_ids == alone.output_ids
