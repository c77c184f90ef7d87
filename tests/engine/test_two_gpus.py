"""Two GPUs that share a model or its requests, through NCCL, replayed from CUDA graphs and not."""

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
MIX = [f"Hello {number}, how are you?" for number in range(20)] + list(PROMPTS.values()) * 2


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
