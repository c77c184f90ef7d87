"""Engines of two and four ranks, in processes that talk through gloo, answer as one rank does."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.distributed import HashStore, ProcessGroupGloo

from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.errors import OptionError, RankError
from qwen3vl_moe.inputs import frames
from qwen3vl_moe.inputs.tokenizer import VIDEO_PLACEHOLDER
from tests.engine.conftest import PROMPTS, check_leaks
from tests.inputs.clips import make_clip

OPTIONS = {"device": "cpu", "dtype": "float32", "progress": False, "max_model_len": 192}
TEXT = "Hello, how are you today?"


def greedy(**more):
    return SamplingParams(**{"temperature": 0, "max_tokens": 64, "ignore_eos": True} | more)


def ids(outputs):
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


def children(pid=None):
    """Processes of this one, or of another, that have not ended."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            state, parent, *_ = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # no process, or one that has just ended
            continue
        if entry.isdigit() and int(parent) == (pid or os.getpid()) and state != "Z":
            found.append(int(entry))
    return found


@pytest.fixture(scope="module")
def tiny(make_tiny):
    return make_tiny("wide")


@pytest.fixture(scope="module")
def alone(tiny):
    return LLM(tiny.published, **OPTIONS, num_blocks=40, max_num_seqs=8)


@pytest.fixture(scope="module")
def two(tiny):
    """Over a cache so small that requests wait for each other, and in chunks."""
    llm = LLM(tiny.published, **OPTIONS, tensor_parallel_size=2, num_blocks=40, max_num_seqs=8, max_prefill_tokens=48)
    yield llm
    llm.close()


def test_64_greedy_tokens_are_those_of_one(alone, two):
    prompts = [TEXT, *PROMPTS.values()]
    assert ids(two.generate(prompts, greedy())) == ids(alone.generate(prompts, greedy()))
    check_leaks(two)


def test_log_probabilities_are_those_of_one(alone, two):
    asked = greedy(max_tokens=8, logprobs=3, prompt_logprobs=2)
    for ours, theirs in zip(*(llm.generate(list(PROMPTS.values()), asked) for llm in (two, alone)), strict=True):
        places = [*zip(ours.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True)]
        places += zip(ours.outputs[0].logprobs, theirs.outputs[0].logprobs, strict=True)
        assert len(places) == len(ours.prompt_token_ids) - 1 + 8
        for our, their in places:
            assert our.keys() == their.keys()
            assert all(abs(our[token].logprob - their[token].logprob) < 1e-4 for token in our)


def test_a_video_file_is_computed_while_it_is_decoded(alone, two, monkeypatch):
    """The other rank hears of a part as of any pictures, and waits for the next as for any call."""
    pytest.importorskip("av", reason="videos need PyAV")
    clip = make_clip(frames=12, rate=8, key_every=4)
    asked = {"videos_kwargs": {"num_frames": 12, "max_pixels": 4096}}
    video = {"prompt": VIDEO_PLACEHOLDER, "multi_modal_data": {"video": clip}, "mm_processor_kwargs": asked}
    monkeypatch.setattr(frames, "PART_TOKENS", 2 * alone.processor.prompt(video).images[0].num_tokens)
    encoded, encode = [], two.engine.runner.encode
    monkeypatch.setattr(two.engine.runner, "encode", lambda pictures: encoded.append(len(pictures)) or encode(pictures))
    assert ids(two.generate(video, greedy())) == ids(alone.generate(video, greedy()))
    assert encoded == [2, 2, 2]
    check_leaks(two)


def answers_to_all_kinds(llm):
    """Ids and texts of requests that ask for more than tokens of text, all in one batch."""
    frames = [Image.new("RGB", (16, 24), (20 * number, 90, 0)) for number in range(5)]
    video = {"prompt": f"One {VIDEO_PLACEHOLDER} and", "multi_modal_data": {"video": frames}}
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    asked = [
        (video, greedy(max_tokens=20, prompt_logprobs=1)),
        (PROMPTS["one image"], SamplingParams(temperature=1.0, seed=3, n=2, max_tokens=10)),
        (TEXT, SamplingParams(temperature=0, max_tokens=40, structured_outputs={"json": schema})),
        (TEXT, greedy(max_tokens=30, stop="e")),
    ]
    for seed in range(4):
        form = {"choice": ["yes", "maybe", "no"]}
        asked.append((TEXT, SamplingParams(temperature=1.0, seed=seed, max_tokens=12, structured_outputs=form)))
    outputs = llm.generate(*map(list, zip(*asked, strict=True)))
    assert all(output.outputs[0].text in ("yes", "maybe", "no") for output in outputs[4:])
    assert json.loads(outputs[2].outputs[0].text).keys() == {"a"}
    return [[(answer.token_ids, answer.text) for answer in output.outputs] for output in outputs]


def test_videos_grammars_and_all_else_that_goes_with_a_request(alone, two):
    assert answers_to_all_kinds(two) == answers_to_all_kinds(alone)


def test_sums_have_the_same_bits_on_all_ranks_each_time():
    """As gloo takes them, of sizes that do not divide."""
    store, size, sums = HashStore(), 4, {}

    def rank(number):
        group = ProcessGroupGloo(store, number, size, timedelta(seconds=60))
        for again in range(3):
            part = torch.randn(3, 1237, generator=torch.Generator().manual_seed(number))
            group.allreduce([part]).wait()
            sums[number, again] = part

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(rank, range(size)))
    assert len(sums) == 3 * size
    assert all(torch.equal(total, sums[0, 0]) for total in sums.values())


def test_the_other_rank_is_one_process(two):
    assert two.settings["tensor_parallel_size"] == 2
    assert len(children()) == 1


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from([TEXT, [7, 8, 9], list(range(5, 100)), *PROMPTS.values()]),
            st.builds(
                lambda drawn, **more: greedy(**more, temperature=float(drawn > 0), n=max(1, drawn)),
                st.integers(0, 2),
                max_tokens=st.integers(1, 60),
                seed=st.integers(0, 3),
                stop=st.sampled_from([None, "e"]),
                bad_words=st.sampled_from([None, ["a"]]),
            ),
        ),
        min_size=1,
        max_size=8,
    ),
    read=st.integers(0, 8),
)
def test_any_mix_of_requests_is_answered_as_by_one(alone, two, requests, read):
    """Some calls are left in the middle before, so that ranks have to forget requests, too."""
    prompts, params = map(list, zip(*requests, strict=True))
    left = two.as_completed(prompts, params)
    for _ in zip(range(read), left, strict=False):
        pass
    left.close()
    assert ids(two.generate(prompts, params)) == ids(alone.generate(prompts, params))
    check_leaks(two)


def test_another_one_in_this_process_is_refused(two, tiny):
    with pytest.raises(OptionError, match="close the LLM that was made before"):
        LLM(tiny.published, **OPTIONS, tensor_parallel_size=2)
    assert len(children()) == 1


def interrupt_and_read(stream):
    os.kill(os.getpid(), signal.SIGINT)
    for _ in stream:
        pass


def test_interrupted_it_goes_on(alone, two):
    for _ in range(3):
        stream = two.stream(TEXT, greedy())
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_read(stream)
        stream.close()
    assert ids(two.generate([TEXT], greedy())) == ids(alone.generate([TEXT], greedy()))
    check_leaks(two)


def test_killed_it_says_so_at_once_and_ever_after(two):
    """The last test: of all calls that are under way, and of those that come later."""
    [worker] = children()
    stream = two.stream(TEXT, greedy())
    next(stream)
    os.kill(worker, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 was killed \(SIGKILL\)"):
        for _ in stream:
            pass
    assert time.monotonic() - begun < 10
    with pytest.raises(RankError, match="this LLM cannot go on, load it again"):
        two.generate([TEXT], greedy())
    assert children() == []


def test_four_ranks_load_again_after_a_close(alone, tiny):
    wanted = ids(alone.generate([TEXT, PROMPTS["three odd images"]], greedy()))
    llm = LLM(tiny.published, **OPTIONS, tensor_parallel_size=4)
    assert len(children()) == 3
    assert ids(llm.generate([TEXT, PROMPTS["three odd images"]], greedy())) == wanted
    llm.close()
    assert children() == []


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_ranks(tiny, size):
    with pytest.raises(OptionError, match="tensor_parallel_size"):
        LLM(tiny.published, **OPTIONS, tensor_parallel_size=size)


def test_what_does_not_divide_is_refused_before_a_process_starts(make_tiny, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(OptionError, match=r"tensor_parallel_size=3 .* choose from 1, 2"):
        LLM(make_tiny("plain").published, **OPTIONS, tensor_parallel_size=3)


def test_an_error_of_another_rank_is_the_first_ones(tiny, tmp_path, monkeypatch):
    """Here it cannot read what the first one can: the file system is another one there."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '-c' in sys.orig_argv:\n"
        "    import qwen3vl_moe.weights.shards as shards\n"
        "    from qwen3vl_moe.errors import CheckpointError\n"
        "    def fail(*arguments): raise CheckpointError('model.safetensors: cannot be read here')\n"
        "    shards._read = fail\n"
    )
    with pytest.raises(RankError, match=r"rank 1 ended: model\.safetensors: cannot be read here"):
        LLM(tiny.published, **OPTIONS, tensor_parallel_size=2)
    assert children() == []


def test_torchrun_starts_them_as_well(tiny, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from qwen3vl_moe import LLM, SamplingParams\n"
        f"llm = LLM({str(tiny.published)!r}, **{OPTIONS}, tensor_parallel_size=2)\n"
        f"[output] = llm.generate([{TEXT!r}], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))\n"
        "print('tokens', output.outputs[0].token_ids)\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens") == 1


def test_torchrun_with_another_number_of_processes(tiny, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(OptionError, match="torchrun has started 4 processes"):
        LLM(tiny.published, **OPTIONS, tensor_parallel_size=2)
