"""Memory of a cache on a CPU: taken as it is filled, not at the start."""

import subprocess
import sys

import torch

from qwen3vl_moe.engine.kv_cache import _cpu_bytes, _zeros

CODE = """
import resource, warnings
from qwen3vl_moe import LLM, SamplingParams
def peak():  # MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
llm = LLM("demo", device="cpu", progress=False)
size = llm.engine.cache.tensor.nbytes >> 20
made = peak()
llm.generate("Hello", SamplingParams(max_tokens=4))
print(before, made, peak(), size)
"""


def test_a_cache_takes_memory_as_it_is_filled():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, made, used, size = map(int, done.stdout.split())
    assert size > 400, "the cache is too small to show anything"
    assert made - before < 300
    assert used - made < 300


def test_it_is_zero_and_of_its_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cache = _zeros((2, 3, 5), dtype, torch.device("cpu"))
        assert torch.equal(cache, torch.zeros(2, 3, 5, dtype=dtype))
        cache[1] = 1
        assert cache.sum() == 15
    assert 0 < _cpu_bytes() <= 4 << 30
