"""The engine on a GPU: the same answers as on the CPU, and a cache that is sized from the device's memory."""

import pytest
import torch

from qwen3vl_moe.engine import LLM, SamplingParams
from tests.engine.conftest import PROMPTS, check_leaks

pytestmark = pytest.mark.gpu


def load(checkpoint, device, dtype="float32", **options):
    return LLM(checkpoint.path, device=device, dtype=dtype, moe="reference", progress=False, **options)


def test_same_tokens_as_on_the_cpu(plain):
    """fp32 on both, so that they differ by the order of summation only."""
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, repetition_penalty=1.2, logprobs=1)
    prompts = list(PROMPTS.values())
    on_cpu = load(plain, "cpu").generate(prompts, params)
    llm = load(plain, "cuda", max_prefill_tokens=7, max_model_len=512)
    on_gpu = llm.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in on_gpu] == [o.outputs[0].token_ids for o in on_cpu]
    assert all(output.metrics.stages["vision"] > 0 for output in on_gpu[1:])
    check_leaks(llm)


def test_a_seed_gives_the_same_tokens_in_any_batch(plain):
    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, max_tokens=32, ignore_eos=True, seed=1)
    llm = load(plain, "cuda", max_model_len=512)
    together = llm.generate(list(PROMPTS.values()), params)
    alone = [llm.generate(prompt, params)[0] for prompt in PROMPTS.values()]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


def test_launching_ahead_changes_no_token(plain):
    """fp32, so that the rows in vain of other requests do not round a request's logits otherwise."""
    prompts = list(PROMPTS.values()) * 3
    params = [SamplingParams(temperature=t, max_tokens=10 + 7 * n, seed=n) for n in range(3) for t in (0, 0.7, 1.0)]
    expected, ours = (
        load(plain, "cuda", max_model_len=512, async_scheduling=on).generate(prompts, params) for on in (False, True)
    )
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_step_of_decoding_is_launched_without_waiting(plain, temperature, monkeypatch):
    """Packing, copying and sampling; the plain loop over the experts waits in the decoder, the fused one does not."""
    llm = load(plain, "cuda", max_model_len=512)
    launch, guard = llm.engine.runner.launch, torch.cuda.set_sync_debug_mode

    def guarded(chunks, after=None):
        guard("default" if after is None else "error")
        hooks = [
            llm.engine.model.text.register_forward_pre_hook(lambda *_: guard("default")),
            llm.engine.model.text.register_forward_hook(lambda *_: guard("default" if after is None else "error")),
        ]
        try:
            return launch(chunks, after)
        finally:
            guard("default")
            for hook in hooks:
                hook.remove()

    params = SamplingParams(temperature=temperature, top_k=20, top_p=0.9, max_tokens=16, ignore_eos=True)
    llm.generate(list(PROMPTS.values()), params)  # what is made once is made here
    monkeypatch.setattr(llm.engine.runner, "launch", guarded)
    llm.generate(list(PROMPTS.values()), params)


def test_bf16_is_as_good_as_plain_torch(plain):
    """Chunks of several prompts over the paged cache, through the fused attention: against fp32, the median error of
    the prompts' log-probabilities is at most twice that of the same model in bf16 on the CPU, fed whole."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)

    def logprobs(llm):
        outputs = llm.generate(list(PROMPTS.values()), params)
        check_leaks(llm)
        entries = [entry for output in outputs for entry in output.prompt_logprobs[1:]]
        return torch.tensor([next(iter(entry.values())).logprob for entry in entries])

    exact = logprobs(load(plain, "cpu"))
    on_cpu = logprobs(load(plain, "cpu", "bfloat16"))
    on_gpu = logprobs(load(plain, "cuda", "bfloat16", max_model_len=512, max_prefill_tokens=7))
    assert (on_gpu - exact).abs().median() <= 2 * (on_cpu - exact).abs().median()


def test_the_cache_leaves_the_memory_that_was_not_given(plain):
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / total
    llm = load(plain, "cuda", gpu_memory_utilization=used + 0.05, max_num_seqs=4096)
    llm.generate(PROMPTS["text"], SamplingParams(max_tokens=2))
    free, _ = torch.cuda.mem_get_info()
    assert used < 1 - free / total <= used + 0.06
    assert llm.engine.max_model_len == 4096
