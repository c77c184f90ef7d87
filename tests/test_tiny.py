"""The random checkpoint made on the spot loads here and in transformers, and both compute the same."""

import torch
from transformers import AutoModelForImageTextToText

from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.tiny import write_random_checkpoint
from tests.model.prompts import assert_close_to_scale, make_prompt, oracle_logits


def test_the_random_checkpoint_is_a_checkpoint(tmp_path):
    write_random_checkpoint(tmp_path)
    oracle = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = Qwen3VLMoe.from_pretrained(tmp_path, dtype=torch.float32, progress=False)
    prompt = make_prompt(oracle.config, [(3, 4)])
    assert_close_to_scale(model.logits(*prompt.our_inputs()), oracle_logits(oracle, prompt))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 3e6
