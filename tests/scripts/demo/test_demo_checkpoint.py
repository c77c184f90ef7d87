"""What the program writes is a checkpoint: both libraries load it and compute the same."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from benchmarking.tiny import TokenIds
from demo_training.evaluation import (
    conversation,
    evaluate,
    heldout_examples,
    our_answers,
    score_pictures,
    score_problems,
)
from demo_training.model import Sizes, build_model, published_config
from demo_training.publish import SHARD_BYTES
from demo_training.texts import Problem
from qwen3vl_moe.engine import LLM, SamplingParams
from qwen3vl_moe.inputs.processor import Processor
from qwen3vl_moe.model import Qwen3VLMoe


def test_both_libraries_read_the_weights_back_and_agree(untrained):
    path, model = untrained
    theirs = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[name], value), name
    ours = Qwen3VLMoe.from_pretrained(path, dtype=torch.float32, progress=False)
    prompt = Processor.from_pretrained(path, ours.config).chat(conversation(heldout_examples(1)[0]))
    ids = torch.tensor([prompt.token_ids])
    patches = torch.cat([image.pixel_values for image in prompt.images])
    grids = [image.grid_thw for image in prompt.images]
    image = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        grid = torch.tensor(grids)
        expected = theirs(input_ids=ids, pixel_values=patches, image_grid_thw=grid, mm_token_type_ids=image).logits[0]
        got = ours.logits(ids[0], patches, grids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_files_are_laid_out_as_published(untrained):
    path, _ = untrained
    index = json.loads((path / "model.safetensors.index.json").read_text())
    config = json.loads((path / "config.json").read_text())["text_config"]
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    with safe_open(path / index["weight_map"][name], "pt") as file:
        shape = file.get_slice(name).get_shape()
    assert shape == [config["num_experts"], config["hidden_size"], 2 * config["moe_intermediate_size"]]
    shards = {path / shard for shard in index["weight_map"].values()}
    assert len(shards) > 1
    assert all(shard.exists() for shard in shards)
    assert config["num_experts"] == 16
    assert "num_local_experts" not in config


def test_the_default_sizes_fit_what_ships():
    sizes = Sizes()
    raw = published_config(sizes, TokenIds(1, 2, 3, 4, 5, 6, 7, 8))
    with torch.device("meta"):
        model = build_model(raw, seed=0)
    assert 2 * sum(p.numel() for p in model.parameters()) <= 32_000_000
    assert SHARD_BYTES < 16 * 2**20
    assert max(2 * p.numel() for p in model.parameters()) < SHARD_BYTES
    assert sizes.experts >= 16
    assert sizes.top_k == 4
    assert sizes.hidden not in (sizes.expert_width, 2 * sizes.expert_width)
    assert sizes.heads > sizes.kv_heads


def test_transformers_tokenizer_and_template_make_the_same_prompt(untrained):
    path, _ = untrained
    theirs = AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "What are you?\n  12345"}]
    output = LLM(path, device="cpu", dtype="float32").chat([messages], SamplingParams(max_tokens=1, temperature=0.0))[0]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert theirs(text, add_special_tokens=False)["input_ids"] == list(output.prompt_token_ids)


def test_transformers_processor_makes_the_same_prompt_and_pixels(untrained):
    pytest.importorskip("torchvision", reason="transformers' AutoProcessor needs torchvision, for its video part")
    path, _ = untrained
    theirs = AutoProcessor.from_pretrained(path)
    llm = LLM(path, device="cpu", dtype="float32")
    for example in heldout_examples(6):
        messages = conversation(example)
        made = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = llm.chat([messages], SamplingParams(max_tokens=1, temperature=0.0))[0]
        assert made["input_ids"][0].tolist() == list(output.prompt_token_ids)


def test_scores_count_every_question_once(untrained):
    llm = LLM(untrained[0], device="cpu", dtype="float32")
    problem = Problem("What is 1 plus 1?", "1+1 = 2.\n#### 2")
    scores, answers = evaluate(partial(our_answers, llm), heldout_examples(5), [problem])
    table = scores["pictures"]
    assert table["all"]["of"] == 5
    assert sum(cell["of"] for kind, cell in table.items() if kind != "all") == 5
    assert scores["training_problems"]["of"] == 1
    assert len(answers) == 6


def test_scores_tell_right_from_wrong():
    examples = heldout_examples(30)
    answers = [example.questions[0].answer for example in examples]
    assert score_pictures(examples, answers)["all"] == {"right": 30, "of": 30}
    wrong = [f"{answer}s" for answer in answers[:10]] + answers[10:]
    assert score_pictures(examples, wrong)["all"] == {"right": 20, "of": 30}
    problems = [Problem("?", "#### 1,200"), Problem("?", "#### 7")]
    assert score_problems(problems, ["So 1200.\n#### 1,200", "It is 7."]) == {"strict": 1, "flexible": 2, "of": 2}
