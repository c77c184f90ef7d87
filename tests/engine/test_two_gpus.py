"""Two GPUs that share a model or its requests, through NCCL, replayed from CUDA graphs and not."""

import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarking.loading import load_llm
from qwen3vl_moe.engine import LLM, SamplingParams
from tests.engine.conftest import PROMPTS, check_leaks
from tests.engine.test_tensor_parallel import children, greedy, ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
ROOT = Path(__file__).resolve().parents[2]
MIX = [f"Hello {number}, how are you?" for number in range(20)] + list(PROMPTS.values()) * 2


@pytest.mark.parametrize(("shapes", "dtype"), [([(1, 2048), (300, 2048)], "bfloat16"), ([(5, 48)], "float32")])
def test_sums_through_shared_memory(tmp_path, shapes, dtype):
    """Beside NCCL's: of two ranks there is one order, so the bits are the same.

    A second group in the same process has no such memory, and says so.
    """
    program = f"""
import sys, torch
from qwen3vl_moe.engine.workers import join
from tests.engine.joined_sums import check_joined
rank, dtype = int(sys.argv[1]), torch.{dtype}
device = torch.device("cuda", rank)
torch.cuda.set_device(device)
ranks = join(rank, 2, device, torch.distributed.FileStore({str(tmp_path / "first")!r}, 2))
draws = [torch.Generator().manual_seed(n) for n in (rank, 2 + rank)]
parts = [torch.randn(shape, generator=draw).to(device, dtype) for shape in {shapes} for draw in draws]
expected = [ranks.sum(part.clone()) for part in parts]
assert ranks.room(parts[0]) is None
assert (problem := ranks.share_memory(300, 2048, dtype, device)) is None, problem
for part, right in zip(parts, expected, strict=True):
    assert torch.equal(ranks.sum(part.clone()), right)
    assert torch.equal(ranks.sum(ranks.room(part).copy_(part)), right)
assert ranks.room(torch.empty(301, 2048, device=device, dtype=dtype)) is None
if dtype is torch.bfloat16:
    check_joined(ranks, device)
torch.cuda.synchronize()
ranks.least(0)
torch.distributed.destroy_process_group()
ranks = join(rank, 2, device, torch.distributed.FileStore({str(tmp_path / "second")!r}, 2))
assert "a group that has ended" in ranks.share_memory(300, 2048, dtype, device)
assert torch.equal(ranks.sum(parts[0].clone()), expected[0])
torch.cuda.synchronize()
ranks.least(0)
torch.distributed.destroy_process_group()
"""
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    processes = [subprocess.Popen([sys.executable, "-c", program, str(rank)], env=paths) for rank in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]


@pytest.fixture(scope="module")
def tiny(make_tiny):
    return make_tiny("wide")


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"data_parallel_size": 2}], ids=str)
def test_tokens_are_those_of_one(tiny, options):
    """fp32, so that only the order of sums differs; the experts run in plain torch, which no graph holds."""
    same = {"device": "cuda", "dtype": "float32", "moe": "reference", "progress": False, "max_model_len": 512}
    expected = ids(LLM(tiny.published, **same, max_num_seqs=8).generate(MIX, greedy()))
    llm = LLM(tiny.published, **same, max_num_seqs=8, **options)
    assert ids(llm.generate(MIX, greedy())) == expected
    check_leaks(llm)
    llm.close()
    assert not children()


def test_graphs_on_two_ranks_say_the_same_each_time():
    """At the published sizes, drawn anew for each run: the bits depend on neither. (Beside one rank: parity.py.)"""
    llm = load_llm(None, load_format="dummy", routing="balanced", tensor_parallel_size=2, max_model_len=4096)
    assert llm.settings["cuda_graphs"]
    assert llm.settings["moe"] == "tma"
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, logprobs=0)
    runs = []
    for _ in range(3):
        outputs = llm.generate(["Describe the image", "Hello"] * 8, params)
        runs.append([[output.outputs[0].token_ids, output.outputs[0].logprobs] for output in outputs])
    assert runs[0] == runs[1] == runs[2]
    check_leaks(llm)
    llm.close()
    assert not children()


def test_a_killed_rank_ends_a_program_within_ten_seconds():
    """In the middle of a step, where the first rank's GPU waits for the other one's."""
    gc.collect()
    torch.cuda.empty_cache()  # what earlier tests left in this process is memory that the program cannot have
    program = f"""
import os, signal, sys, threading, time
sys.path[:0] = {[str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]}
from benchmarking.loading import load_llm
from qwen3vl_moe import SamplingParams
llm = load_llm(None, load_format="dummy", tensor_parallel_size=2, max_model_len=4096, max_num_seqs=8)
[worker] = llm._workers._processes
threading.Timer(2, lambda: (print("killed", time.time(), flush=True), os.kill(worker.pid, signal.SIGKILL))).start()
llm.generate(["Hello"], SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    ended = time.time()
    assert done.returncode, "it went on without the other rank"
    killed = re.search("killed ([0-9.]+)", done.stdout)
    assert killed, f"it ended before:\n{done.stderr}"
    assert ended - float(killed[1]) < 10
    assert "rank 1 was killed (SIGKILL)" in done.stderr.strip().splitlines()[-1]
