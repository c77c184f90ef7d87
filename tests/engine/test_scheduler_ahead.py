"""The scheduler where frames of videos come late: nobody computes without them, and nobody waits for another's."""

from collections import Counter
from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from qwen3vl_moe.inputs.frames import Part
from tests.engine.test_scheduler import (
    BEGINNINGS,
    Model,
    check_cache,
    check_step,
    check_step_ahead,
    make_scheduler,
    make_sequence,
    requests,
    to_encode,
)


def with_parts(sequence, pictures):
    """The same with its pictures in parts of so many, and these parts."""
    parts = [Part() for _ in sequence.prompt.images[::pictures]]
    images = [replace(image, part=parts[n // pictures]) for n, image in enumerate(sequence.prompt.images)]
    sequence.prompt = replace(sequence.prompt, images=tuple(images))
    sequence.__post_init__()
    return parts


def test_random_loads_finish_whenever_frames_come():
    seen = Counter()

    @settings(max_examples=150, deadline=None)
    @given(
        arrivals=BEGINNINGS.flatmap(lambda beginnings: st.lists(requests(beginnings), min_size=1, max_size=8)),
        pictures=st.integers(1, 3),
        delays=st.lists(st.integers(0, 12), min_size=1, max_size=20),
        block_size=st.integers(1, 5),
        spare_blocks=st.integers(0, 8),
        runs_ahead=st.booleans(),
        max_num_seqs=st.integers(1, 5),
        max_prefill_tokens=st.integers(1, 30),
        max_encoder_tokens=st.integers(1, 20),
    )
    @example(  # a text, and a video whose last frames come late: rare among the others
        arrivals=[(0, make_sequence([0] * 4, 12), None), (0, make_sequence([0, ("a", 3), 0, ("b", 2), 0], 1), None)],
        pictures=1,
        delays=[0, 12],
        block_size=4,
        spare_blocks=8,
        runs_ahead=False,
        max_num_seqs=2,
        max_prefill_tokens=30,
        max_encoder_tokens=20,
    )
    def play(arrivals, pictures, delays, block_size, spare_blocks, runs_ahead, **options):
        longest = max(sequence.max_len for _, sequence, _ in arrivals)
        scheduler = make_scheduler(-(-longest // block_size) + spare_blocks, block_size, **options)
        model, finished, step, launched, coming = Model(scheduler), [], 0, [], []
        todo = [sequence for _, sequence, _ in arrivals]
        for number, sequence in enumerate(todo):
            parts = with_parts(sequence, pictures) if number % 3 != 2 else []
            coming += [(delays[n % len(delays)] + 2 * n, part) for n, part in enumerate(parts)]
            scheduler.add(sequence)
        work = sum(sequence.max_len * (sequence.params.max_tokens + 1) for sequence in todo)
        while len(finished) < len(todo):
            for due, part in coming:
                if due <= step and not part.done():
                    part.set_result(None)
            if not launched:
                chunks = scheduler.schedule()
                if not chunks:
                    seen["nothing to do"] += 1
                    assert any(sequence.undecoded for sequence in [*scheduler.running, *scheduler.waiting])
                check_step(scheduler, chunks)
                for sequence, _, image in to_encode(chunks):
                    assert image.part is None or image.part.ready
                    seen["encoded before the last frames"] += bool(sequence.undecoded)
                seen["computed beside one that waits for frames"] += any(
                    sequence.undecoded and sequence not in [chunk.sequence for chunk in chunks]
                    for sequence in (scheduler.running if chunks else ())
                )
                seen["passed"] += any(sequence.undecoded for sequence in scheduler.waiting) and bool(chunks)
                if chunks:
                    launched.append((chunks, model.launch(chunks)))
            undecoded = [sequence for sequence in scheduler.running if sequence.undecoded]
            assert len([each for each in undecoded if each.part_from(each.num_computed)[0] is not None]) <= 1
            if runs_ahead and len(launched) == 1 and (chunks := scheduler.ahead(launched[0][0])):
                check_step_ahead(scheduler, chunks)
                launched.append((chunks, model.launch(chunks, launched[0][1])))
            if launched:
                finished += model.read(*launched.pop(0))
            check_cache(scheduler)
            step += 1
            assert step < 100 + work * len(todo)
        seen["found again"] += scheduler.num_cached_tokens

    play()
    assert len(seen) == 5, "the loads are too easy"
    assert min(seen.values()) > 0, "the loads are too easy"


def test_each_part_is_computed_by_itself_however_many_are_there():
    for ready in (1, 3):
        model = Model(make_scheduler(100, 4, max_prefill_tokens=100))
        sequence = make_sequence([0, ("a", 3), 0, ("b", 2), 0, ("c", 4), 0, 0], 1)
        parts = with_parts(sequence, 1)
        for part in parts[:ready]:
            part.set_result(None)
        model.scheduler.add(sequence)
        spans = []
        for part in parts:
            if not part.done():
                assert model.scheduler.schedule() == []
                part.set_result(None)
            [chunk] = chunks = model.scheduler.schedule()
            spans.append((chunk.start, chunk.stop))
            model.compute(chunks)
        assert spans == [(0, 5), (5, 8), (8, 14)]


def test_steps_are_launched_ahead_beside_one_that_waits_for_frames():
    """Whether it is admitted already, or not: until its frames are there."""
    for ready in (0, 1):
        model = Model(make_scheduler(100, 4, max_prefill_tokens=100))
        scheduler, text = model.scheduler, make_sequence([0] * 4, 50)
        video = make_sequence([0, ("a", 3), 0, ("b", 2), 0], 1)
        parts = with_parts(video, 1)
        for part in parts[:ready]:
            part.set_result(None)
        for sequence in (text, video):
            scheduler.add(sequence)
        model.compute(scheduler.schedule())
        assert scheduler.running == [text, video][: 1 + ready]
        chunks = scheduler.schedule()
        assert [chunk.sequence for chunk in chunks] == [text]
        assert [chunk.sequence for chunk in scheduler.ahead(chunks)] == [text]
        for part in parts[ready:]:
            part.set_result(None)
        assert not scheduler.ahead(chunks)


def test_one_whose_frames_have_failed_computes_nothing():
    scheduler = make_scheduler(100, 4)
    sequence = make_sequence([0, ("a", 3), 0], 1)
    for part in with_parts(sequence, 1):
        part.set_exception(ValueError())
    scheduler.add(sequence)
    assert scheduler.schedule() == []
