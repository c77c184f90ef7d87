"""The engine on a GPU: the same answers as on the CPU, and a cache that is sized from the device's memory."""

import dataclasses
import gc
import math
from itertools import groupby
from random import Random

import pytest
import torch

from benchmarking.loading import load_llm
from demo_training.evaluation import conversation, heldout_examples, problem_conversation
from demo_training.texts import arithmetic_problem
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.model import Qwen3VLMoe
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
    biased = {"logit_bias": {5: 3.0, 9: -100}, "allowed_token_ids": range(400)}
    asked = ({}, biased, {"min_tokens": 8, "bad_words": ["e", "an"]})
    params = [
        SamplingParams(temperature=t, max_tokens=10 + 7 * n, seed=n, **asked[n])
        for n in range(3)
        for t in (0, 0.7, 1.0)
    ]
    expected, ours = (
        load(plain, "cuda", max_model_len=512, async_scheduling=on).generate(prompts, params) for on in (False, True)
    )
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize(
    "asked", [{"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "logit_bias": {5: 3.0, 9: -100}}]
)
def test_a_step_of_decoding_is_launched_without_waiting(plain, asked, monkeypatch):
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

    params = SamplingParams(**asked, top_k=20, top_p=0.9, max_tokens=16, ignore_eos=True)
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


USERS = {"max_model_len": 512, "max_num_seqs": 9, "max_prefill_tokens": 200, "async_scheduling": True}


def plain_twin(llm, dtype, **cache):
    """The same weights with the plain experts and attention, launched step by step."""
    model = Qwen3VLMoe(llm.engine.model.config, "reference").to("cuda", dtype)
    model.load_state_dict(llm.engine.model.state_dict())
    options = USERS | {"enforce_eager": True, "async_scheduling": False} | cache
    return LLM.from_parts(model, llm.processor, llm.engine.defaults, **options)


def is_what_users_run(llm):
    return llm.settings["moe"] == "tma" and llm.settings["cuda_graphs"] and llm.settings["attention"] != "torch"


def test_the_fused_engine_answers_as_plain_torch_in_fp32():
    """Experts in kernels, CUDA graphs and launches ahead together, on weights that mean something: wherever fp32 gives
    every token of its answer more than three quarters of the probability, the answer is the same word for word."""
    llm = LLM("demo", device="cuda", moe="tma", progress=False, **USERS)
    assert is_what_users_run(llm)
    rng = Random(0)
    questions = [conversation(example) for example in heldout_examples(60)]
    questions += [problem_conversation(arithmetic_problem(rng)) for _ in range(40)]
    params = SamplingParams(temperature=0, max_tokens=160, logprobs=0)
    plain = plain_twin(llm, torch.float32)
    for _ in range(2):  # the second time from cached prefixes, in other company
        rng.shuffle(questions)
        ours = [output.outputs[0] for output in llm.chat(questions, params)]
        exact = [output.outputs[0] for output in plain.chat(questions, params)]
        sure = [
            all(math.exp(entry[token].logprob) > 0.75 for token, entry in zip(a.token_ids, a.logprobs, strict=True))
            for a in exact
        ]
        assert sum(sure) > len(sure) / 2
        assert [a.text for a, is_sure in zip(ours, sure, strict=True) if is_sure] == [
            a.text for a, is_sure in zip(exact, sure, strict=True) if is_sure
        ]
    check_leaks(llm)


@pytest.mark.parametrize("cache", [{}, {"kv_cache_dtype": "fp8"}], ids=["", "cache in FP8"])
def test_the_fused_engine_is_as_exact_as_plain_torch(monkeypatch, cache):
    """Three layers at the 30B widths: the mean square error of the generated tokens' log-probabilities against fp32,
    given the same tokens before, is at most four times that of the plain experts in eager steps of the same dtype.
    An output that is not this step's misses by the width of the logits, a hundred times further. Beside a cache in FP8
    both round their keys and values to it, and fp32 does not."""
    config = Qwen3VLMoeConfig.qwen3_vl_30b_a3b()
    config = dataclasses.replace(
        config,
        text=dataclasses.replace(config.text, num_layers=3),
        vision=dataclasses.replace(config.vision, depth=3, deepstack_indexes=(0, 1)),
    )
    monkeypatch.setattr(Qwen3VLMoeConfig, "qwen3_vl_30b_a3b", classmethod(lambda cls: config))
    llm = load_llm(None, load_format="dummy", device="cuda", moe="tma", **USERS, **cache)
    assert is_what_users_run(llm)
    exact = plain_twin(llm, torch.float32)
    image_token_id = llm.engine.model.config.image_token_id
    # Twice as many requests as fit, with answers of many lengths: steps of all sizes, prefill beside decoding.
    prompts = list(PROMPTS.values()) * 6
    params = [SamplingParams(temperature=0, max_tokens=12 + 5 * n, ignore_eos=True, logprobs=0) for n in range(18)]
    score = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def error(llm):
        outputs = llm.generate(prompts, params)
        check_leaks(llm)
        scored = exact.generate(list(map(given_again, prompts, outputs)), score)
        errors = []
        for output, again in zip(outputs, scored, strict=True):
            answer = output.outputs[0]
            assert again.prompt_token_ids == output.prompt_token_ids + answer.token_ids
            truth = again.prompt_logprobs[-len(answer.token_ids) :]
            for token, ours, theirs in zip(answer.token_ids, answer.logprobs, truth, strict=True):
                errors.append(ours[token].logprob - theirs[token].logprob)
        return torch.tensor(errors).square().mean()

    def given_again(prompt, output):
        """A prompt with its answer, as token ids, with one placeholder per image."""
        ids = []
        for token, run in groupby(output.prompt_token_ids):
            ids += [token] if token == image_token_id else run
        answered = ids + output.outputs[0].token_ids
        return {"prompt_token_ids": answered, "multi_modal_data": prompt["multi_modal_data"]}

    assert error(llm) <= 2**2 * error(plain_twin(llm, torch.bfloat16, **cache))


def test_the_cache_leaves_the_memory_that_was_not_given(plain):
    gc.collect()  # the engines of other tests
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used = (total - free) / total
    llm = load(plain, "cuda", gpu_memory_utilization=used + 0.05, max_num_seqs=4096)
    llm.generate(PROMPTS["text"], SamplingParams(max_tokens=2))
    free, _ = torch.cuda.mem_get_info()
    assert used < 1 - free / total <= used + 0.06
    assert llm.engine.max_model_len == 4096
