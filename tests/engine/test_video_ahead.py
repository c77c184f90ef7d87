"""A video file's first frames are computed while its later ones are decoded, and all else is as if they were not."""

import gc
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qwen3vl_moe.engine import SamplingParams
from qwen3vl_moe.errors import PromptError
from qwen3vl_moe.inputs import frames as frames_module
from qwen3vl_moe.inputs.frames import GroupedFrames
from qwen3vl_moe.inputs.images import copy_pixels, cut_patches
from qwen3vl_moe.inputs.tokenizer import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from tests.engine.conftest import PROMPTS, check_leaks, picture
from tests.engine.test_greedy import oracle_tokens, tokens
from tests.engine.test_interrupts import Impatient, Interrupter
from tests.inputs.clips import make_clip

pytest.importorskip("av", reason="videos need PyAV")
pytestmark = pytest.mark.timeout(60)

FRAMES = 15  # of which the last one is repeated: 8 pictures in 4 parts
CLIP, OTHER = (
    make_clip(frames=FRAMES, rate=8, key_every=4, size=size, options={"sc_threshold": "0"})
    for size in ((64, 48), (48, 64))
)
WAIT = 20  # seconds, of what would never come


def greedy(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 16, "ignore_eos": True} | more)


def asking(question="What is it?", videos=(CLIP,), **more):
    data = {"video": list(videos), **more}
    text = "".join([VIDEO_PLACEHOLDER, *(IMAGE_PLACEHOLDER for _ in more), *(VIDEO_PLACEHOLDER for _ in videos[1:])])
    kwargs = {"videos_kwargs": {"num_frames": FRAMES, "max_pixels": 4096}}
    return {"prompt": f"See {text}{question}", "multi_modal_data": data, "mm_processor_kwargs": kwargs}


class Gate:
    """Holds frames back from their places in the pictures.

    Attributes:
        held: places from which on they wait until it is ``open``.
        error: raised for these then.
        put: places that were filled.
    """

    def __init__(self):
        self.open, self.held, self.error, self.put = threading.Event(), FRAMES, None, []

    def __call__(self, made, place, frame):
        if place >= self.held:
            assert self.open.wait(WAIT)
            if self.error is not None:
                raise self.error
        self.put.append(place)
        _put(made, place, frame)


_put = GroupedFrames.put


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(frames_module, "PART_TOKENS", 4)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(GroupedFrames, "put", lambda *given: gate(*given))
    yield gate
    gate.open.set()


@pytest.fixture
def llm(plain, make_llm):
    return make_llm(plain, num_blocks=512)


def until(condition):
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def call(llm, *given):
    """In a thread of its own."""
    return ThreadPoolExecutor(1).submit(lambda: llm.generate(*given))


def test_the_tower_begins_before_the_last_frames_are_decoded(llm, gate, encoded):
    gate.held = 13
    answer = call(llm, asking(), greedy())
    until(lambda: sum(encoded) == 6)  # for ever, if all frames were waited for
    assert max(gate.put) < 13
    gate.open.set()
    (output,) = answer.result(WAIT)
    assert encoded == [2, 2, 2, 2]
    assert output.outputs[0].token_ids == oracle_tokens_of(llm, asking())[:16]
    check_leaks(llm)


def oracle_tokens_of(llm, prompt):
    """By steps that find every frame decoded."""
    whole = llm.generate([prompt, "a"], greedy())
    return whole[0].outputs[0].token_ids


def test_tokens_equal_transformers(tiny, make_llm):
    llm = make_llm(tiny)
    for prompt in (asking(), asking(videos=(CLIP, OTHER), image=picture(40, 30))):
        (output,) = llm.generate(prompt, greedy(max_tokens=64))
        assert output.outputs[0].token_ids == oracle_tokens(tiny, llm.processor.prompt(prompt))
    check_leaks(llm)


def test_pictures_and_features_are_those_of_the_undivided_way(llm):
    """Bit for bit: each group of frames is a segment of its own to the tower."""
    ahead, whole = (llm.processor.prompt(asking(), ahead=ahead) for ahead in (True, False))
    assert [image.part for image in whole.images] == [None] * 8
    assert len({image.part for image in ahead.images}) == 4
    for image in ahead.images:
        image.part.result(WAIT)
    assert [image.digest for image in ahead.images] == [image.digest for image in whole.images]
    assert ahead.token_ids == whole.token_ids
    pictures = [image.picture for image in ahead.images]
    parts = [llm.engine.runner.encode(pictures[n : n + 2])[0] for n in range(0, 8, 2)]
    features, _ = llm.engine.runner.encode([image.picture for image in whole.images])
    assert torch.equal(torch.cat([part.embeds_MH for part in parts]), features.embeds_MH)
    assert torch.equal(torch.cat([part.deepstack_LMH for part in parts], 1), features.deepstack_LMH)


@pytest.mark.parametrize("held", [0, 5, FRAMES])
def test_the_clock_decides_no_step(llm, gate, encoded, held):
    """Two videos and an image: the same calls of the tower, whether frames come late or all at once."""
    gate.held = held
    answer = call(llm, asking(videos=(CLIP, OTHER), image=picture(40, 30)), greedy())
    time.sleep(0.05 if held < FRAMES else 0)
    gate.open.set()
    answer.result(WAIT)
    assert encoded == [2, 2, 2, 3, 2, 2, 2, 2]


@pytest.mark.parametrize("options", [{"max_prefill_tokens": 7}, {"max_encoder_tokens": 3}, {"max_num_seqs": 1}])
def test_chunks_of_any_size(plain, make_llm, llm, encoded, options):
    expected = oracle_tokens_of(llm, asking())
    encoded.clear()
    small = make_llm(plain, **options)
    (output,) = small.generate(asking(), greedy())
    assert output.outputs[0].token_ids == expected
    assert sum(encoded) == 8
    check_leaks(small)


def test_several_requests_are_decoded_whole_ahead_of_their_steps(llm, encoded):
    llm.generate([asking(), asking("Who?")], greedy())
    assert encoded[0] == 8


def test_others_are_answered_meanwhile(llm, gate, encoded):
    """By calls in other threads, with the first frames or with none, and their pictures count for themselves."""
    for held in (0, 6):
        gate.held, gate.error = held, None
        gate.open.clear()
        llm.engine.cache.forget_all()
        encoded.clear()
        answer = call(llm, asking(), greedy())
        until(lambda: sum(encoded) == gate.held // 4 * 2)
        (text,) = llm.generate("Hello", greedy(max_tokens=24))
        (image,) = llm.generate(PROMPTS["one image"], greedy())
        assert (len(text.outputs[0].token_ids), len(image.outputs[0].token_ids)) == (24, 16)
        assert not answer.done()
        gate.open.set()
        answer.result(WAIT)
    check_leaks(llm)


def test_answers_of_one_request_share_what_is_computed(llm, gate, encoded):
    gate.held = 6
    answer = call(llm, asking(), greedy(n=3, temperature=1.0, seed=1))
    until(lambda: sum(encoded) == 2)
    gate.open.set()
    (output,) = answer.result(WAIT)
    assert len(output.outputs) == 3
    assert sum(encoded) == 8 + 2, "beside the first one's, those in which the last full block ends"
    check_leaks(llm)


def test_a_failure_in_the_midst_ends_that_request_alone(llm, gate, encoded):
    gate.held, gate.error = 13, PromptError("video 0 (clip): some of its 15 frames cannot be decoded")
    video = call(llm, asking(), greedy())
    until(lambda: sum(encoded) == 6)
    text = llm.stream("Hello", greedy(max_tokens=200))
    next(text)
    gate.open.set()
    with pytest.raises(PromptError, match=r"^video 0 \(clip\): some of its 15 frames cannot be decoded$"):
        video.result(WAIT)
    assert len(list(text)[-1].outputs[0].token_ids) == 200
    check_leaks(llm)
    # Nothing that was not decoded can be found.
    gate.error = None
    expected = oracle_tokens_of(llm, asking())
    assert tokens(llm.generate(asking(), greedy())) == [expected]


def test_a_damaged_file_ends_its_request(llm, encoded):
    """The frames before the damage have been computed by then, or not: the line is the same."""
    damaged = bytearray(CLIP)
    at = CLIP.index(b"mdat") + 4
    end = len(CLIP) if CLIP.index(b"moov") < at else CLIP.index(b"moov") - 4
    damaged[at + (end - at) * 3 // 4 : end] = bytes(end - at - (end - at) * 3 // 4)
    for given in (asking(videos=[bytes(damaged)]), [asking(videos=[bytes(damaged)]), "a"]):
        with pytest.raises(PromptError, match=r"video 0 .* cannot be decoded: the file is damaged, or ends early"):
            llm.generate(given, greedy())
        check_leaks(llm)


@pytest.fixture
def read(monkeypatch):
    """Set when the file is not read any more."""
    ended, fill = threading.Event(), GroupedFrames.fill

    def watched(made, read, where):
        def counted(*given):
            read(*given)
            ended.set()

        return fill(made, counted, where)

    monkeypatch.setattr(GroupedFrames, "fill", watched)
    return ended


EVERY_FRAME_A_KEY = {"frames": FRAMES, "rate": 8, "key_every": 1}


def test_a_stream_that_is_not_read_stops_the_decoding(llm, gate, read):
    gate.held = 3
    stream = llm.stream(asking(videos=[make_clip(**EVERY_FRAME_A_KEY)]), greedy())
    until(lambda: len(gate.put) == 3)
    stream.close()
    check_leaks(llm)
    gc.collect()
    gate.open.set()
    assert read.wait(WAIT)
    assert len(gate.put) < FRAMES, "frames were decoded for nobody"


def test_an_interrupt_while_frames_are_waited_for_stops_the_decoding(llm, gate, read, monkeypatch):
    """Also where the traceback, and with it the prompt, is kept."""
    gate.held = 3
    engine, wait = llm.engine, llm.engine.wait_for_frames
    prompt = asking(videos=[make_clip(**EVERY_FRAME_A_KEY)])

    def interrupted():
        if engine._stalled:
            raise KeyboardInterrupt
        wait()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "wait_for_frames", interrupted)
        with pytest.raises(KeyboardInterrupt) as caught:
            llm.generate(prompt, greedy())
    assert caught.tb is not None
    check_leaks(llm)
    assert not engine._arrivals._sequences
    gate.open.set()
    assert read.wait(WAIT)
    assert len(gate.put) < FRAMES, "frames were decoded for nobody"
    assert tokens(llm.generate(prompt, greedy())) == [oracle_tokens_of(llm, prompt)]


@pytest.mark.parametrize("kind", [Interrupter, Impatient])
def test_an_interrupt_at_any_line(llm, kind):
    def ask(llm):
        return tokens(llm.generate(asking(), greedy(n=2, temperature=1.0, seed=5)))

    expected, counter = ask(llm), Interrupter()
    counter.run(ask, llm)
    rng, struck = random.Random(kind.__name__), 0
    for _ in range(8):
        llm.engine.cache.forget_all()
        struck += kind(rng.randint(1, counter.lines)).run(ask, llm)
        assert ask(llm) == expected
        check_leaks(llm)
        assert not llm.engine._arrivals._sequences
    assert struck >= 5


def test_a_question_about_a_known_file_waits_for_no_frame(plain, make_llm, gate, encoded, tmp_path):
    """Bytes or a path: a file is known by its content."""
    (tmp_path / "clip.mp4").write_bytes(CLIP)
    llm = make_llm(plain, block_size=2)
    expected = tokens(llm.generate([asking(), asking("How many?")], greedy()))
    encoded.clear()
    gate.held = 0
    again = call(llm, asking("How many?", [str(tmp_path / "clip.mp4")]), greedy())
    assert tokens(again.result(WAIT)) == expected[1:]
    assert encoded == []


def test_frames_are_known_by_their_file_and_place(llm):
    def digests(clip=CLIP, **more):
        prompt = asking(videos=[clip])
        prompt["mm_processor_kwargs"]["videos_kwargs"].update(more)
        return [image.digest for image in llm.processor.prompt(prompt).images]

    assert digests() == digests()
    assert digests(num_frames=8)[0] != digests()[0]
    assert digests(resized_height=32, resized_width=32)[0] != digests()[0]
    assert set(digests(OTHER)).isdisjoint(digests())
    assert len(set(digests())) == 8


def test_a_prompt_that_is_too_long_is_refused_before_any_frame(plain, make_llm, gate):
    gate.held = 0
    llm = make_llm(plain, num_blocks=4, block_size=16)
    with pytest.raises(PromptError, match="leaves no room for an answer"):
        llm.generate(asking(), greedy())
    llm.processor.max_model_len = 64
    try:
        with pytest.raises(PromptError, match="there is room for"):
            llm.generate(asking(), greedy())
    finally:
        llm.processor.max_model_len = None
    check_leaks(llm)


def test_pixels_of_a_part_are_there_when_it_is_done(llm):
    prompt = llm.processor.prompt(asking(), ahead=True)
    for image in prompt.images:
        image.part.result(WAIT)
        assert image.part.ready
    again = llm.processor.prompt(asking())
    for ours, theirs in zip(prompt.images, again.images, strict=True):
        both = [cut_patches(copy_pixels([each.picture], "cpu"), [each.picture]) for each in (ours, theirs)]
        assert torch.equal(*both)


def test_many_threads_ask_about_files(plain, make_llm):
    """Of one another's, too; on a cache that does not hold all of them, so that some are preempted."""
    llm = make_llm(plain, num_blocks=80, block_size=4, max_num_seqs=3)
    prompts = [asking(), asking("Who?", [OTHER]), "Hello", asking("And?", [OTHER, CLIP]), asking()]
    expected = tokens(llm.generate(prompts, greedy()))
    llm.engine.cache.forget_all()
    with ThreadPoolExecutor(5) as pool:
        asked = [n for _ in range(4) for n in range(5)]
        found = list(pool.map(lambda n: tokens(llm.generate(prompts[n], greedy()))[0], asked))
    assert found == [expected[n] for n in asked]
    check_leaks(llm)
