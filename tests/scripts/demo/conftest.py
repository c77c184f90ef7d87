"""The training code lives beside the scripts; a tiny untrained checkpoint of its making."""

from __future__ import annotations

import pytest

from demo_training.model import SMALL, build_model, published_config, token_ids
from demo_training.publish import write_json, write_weights
from demo_training.tokenizer import write_processor


@pytest.fixture(scope="session")
def untrained(tmp_path_factory):
    """Directory and transformers model (fp32, weights scaled up so that mistakes show) of an untrained demo."""
    path = tmp_path_factory.mktemp("demo")
    write_processor(path, [], vocab_size=SMALL.vocab, seed=0)
    ids = token_ids(path)
    raw = published_config(SMALL, ids)
    write_json(path / "config.json", raw)
    write_json(path / "generation_config.json", {"do_sample": False, "eos_token_id": [ids.im_end, ids.endoftext]})
    model = build_model(raw, seed=0).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" not in name and parameter.ndim > 1:
            parameter.mul_(3)
        parameter.copy_(parameter.bfloat16().float())  # what the files can hold
    write_weights(model, path, shard_bytes=1 << 20)
    return path, model
