"""Every experts class of the installed transformers, found in its source: computed right, or refused with a reason."""

import ast
import functools
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import tma_moe.hf

E, H, I, K, T = 6, 32, 16, 3, 9  # noqa: E741
MODELS = Path(transformers.__file__).parent / "models"
# Some that people use: refusing everything is no answer.
STANDARD = {
    "DeepseekV3Experts", "Glm4MoeExperts", "MixtralExperts", "OlmoeExperts", "Qwen2MoeExperts", "Qwen3MoeExperts",
    "Qwen3NextExperts", "Qwen3VLMoeTextExperts",
}  # fmt: skip


@functools.cache
def experts_classes() -> dict[str, str]:
    """Class -> module, of every class that transformers' decorator makes an experts class."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "@use_experts_implementation" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and any(
                    "use_experts_implementation" in ast.unparse(decorator) for decorator in node.decorator_list
                ):
                    found[node.name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return found


class Config:
    """Whatever a class asks of its model's config, by the name's sense."""

    def __init__(self, activation: str):
        self.activation, self._experts_implementation = activation, "eager"

    def __getattr__(self, name: str):
        for part, value in (
            ("per_tok", K), ("experts", E), ("intermediate", I), ("expert", I), ("act", self.activation),
            ("hidden", H), ("eps", 1e-6), ("limit", 0.5), ("alpha", 1.7), ("beta", 1.7), ("softcap", 5.0),
            ("latent", None),
        ):  # fmt: skip
            if part in name and not name.startswith("__"):
                return value
        raise AttributeError(name)


@torch.no_grad()
def run(name: str, activation: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor | str]:
    """A module, what its own forward gives, and what ours gives, or why it is refused."""
    module = getattr(importlib.import_module(experts_classes()[name]), name)(Config(activation)).eval()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids_TK = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    arguments = torch.randn(T, H), ids_TK, torch.rand(T, K)
    eager = module(*arguments)
    module.config._experts_implementation = "tma_moe_reference"
    try:
        return module, eager, module(*arguments)
    except ValueError as error:
        return module, eager, str(error)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("name", sorted(experts_classes()))
def test_right_or_refused(name, activation):
    module, eager, ours = run(name, activation)
    if isinstance(ours, str):
        assert "grouped_mm" in ours
        assert name not in STANDARD or activation != "silu", ours
        return
    assert activation == "silu" or not isinstance(module.act_fn, type(transformers.activations.ACT2FN[activation]))
    assert module in tma_moe.hf._weights_of, "the op was not called"
    # Both are float32; only the order of the sums differs.
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


def test_most_are_standard():
    names = set(experts_classes())
    assert names >= STANDARD
    assert len(names) >= 20


@pytest.mark.skipif("MuseSparkExperts" not in experts_classes(), reason="this transformers has no such class")
def test_a_norm_after_each_expert_is_refused_by_name():
    _, _, refusal = run("MuseSparkExperts", "silu")
    assert "has_post_expert_norm=True" in refusal
