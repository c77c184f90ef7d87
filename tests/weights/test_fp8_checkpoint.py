"""Checkpoints in block-scaled FP8: what is loaded is what transformers computes with, and what is not is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config

from qwen3vl_moe import LLM, SamplingParams
from qwen3vl_moe.config import Qwen3VLMoeConfig
from qwen3vl_moe.errors import ConfigError
from qwen3vl_moe.model import Qwen3VLMoe
from qwen3vl_moe.ops import block_linear
from qwen3vl_moe.quantization import Fp8Config
from qwen3vl_moe.weights import load_model
from qwen3vl_moe.weights.checkpoint import check_tensors, find_expert_layout
from qwen3vl_moe.weights.scales import scale_name
from qwen3vl_moe.weights.shards import StoredTensor
from qwen3vl_moe.weights.table import LAYOUTS, expand_table
from tests.fp8 import CONFIG, write_fp8
from tests.model.prompts import assert_close_to_scale, make_prompt, oracle_logits
from tests.weights.conftest import message
from tma_moe import block_fp8, reference


@pytest.fixture(scope="module")
def blocks(make_tiny):
    return make_tiny("blocks")


def oracle_with(blocks, exact: dict[str, torch.Tensor], published: bool):
    """transformers' model with the weights that FP8 numbers and scales stand for."""
    oracle = copy.deepcopy(blocks.oracle)
    turned = {n: x.transpose(1, 2) if published and ".experts." in n else x for n, x in exact.items()}
    oracle.load_state_dict(turned)
    return oracle


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32], ids=str)
def test_weights_and_scales_are_those_of_transformers(blocks, tmp_path, layout, scales, monkeypatch):
    """With activations left as they are, logits equal those of the dequantised model but for float32's rounding."""
    published = layout == "published"
    exact = write_fp8(blocks.paths[layout], tmp_path, published=published, scales=scales)
    model = load_model(tmp_path, progress=False)
    assert model.text.layers[0].attn.qkv.shared == 64
    for module in (block_linear, reference):
        monkeypatch.setattr(module, "quantize_rows", lambda x: (x, torch.ones(len(x), block_fp8.blocks(x.shape[1]))))
    prompt = make_prompt(blocks.oracle.config, [(2, 3)])
    assert_close_to_scale(
        model.logits(*prompt.our_inputs()), oracle_logits(oracle_with(blocks, exact, published), prompt)
    )


def test_activations_are_rounded_as_the_format_says(blocks, tmp_path):
    """Every product against another evaluation of the same arithmetic: value by value, in float64."""
    write_fp8(blocks.path, tmp_path, published=False)
    layer = load_model(tmp_path, progress=False).text.layers[1]

    def rounded(x_TK: torch.Tensor) -> torch.Tensor:
        rows = []
        for row in x_TK:
            groups = []
            for group in row.split(128):
                scale = group.abs().max() / 448
                groups.append((group / scale).to(torch.float8_e4m3fn).double() * scale.double())
            rows.append(torch.cat(groups))
        return torch.stack(rows)

    def exact(weight: torch.Tensor, scale: torch.Tensor, shared: int) -> torch.Tensor:
        out = weight.double()
        for n in range(out.shape[0]):
            for k in range(out.shape[1]):
                out[n, k] *= scale[n // shared, k // 128].double()
        return out

    x = torch.randn(5, 144)
    qkv = layer.attn.qkv
    assert_close_to_scale(qkv(x).double(), rounded(x) @ exact(qkv.weight, qkv.scale, 64).T, 1e-6)
    experts, e = layer.moe.experts, 2
    gate, up = (rounded(x) @ exact(experts.gate_up[e], experts.gate_up_scale[e], 128).T).chunk(2, dim=-1)
    h = (torch.nn.functional.silu(gate) * up).float()
    expected = rounded(h) @ exact(experts.down[e], experts.down_scale[e], 128).T
    ids, ones = torch.full((5, 1), e), torch.ones(5, 1)
    y = reference.fused_moe_reference(
        x, ids, ones, experts.gate_up, experts.down, experts.gate_up_scale, experts.down_scale
    )
    assert_close_to_scale(y.double(), expected, 1e-6)


def test_the_dtype_is_that_of_all_but_the_quantised(blocks, tmp_path):
    write_fp8(blocks.published, tmp_path, published=True)
    model = load_model(tmp_path, dtype="bfloat16", progress=False)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    fp8 = {n for n, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}
    assert {n.split(".", 3)[3] for n in fp8} == {
        "attn.qkv.weight", "attn.out.weight", "moe.experts.gate_up", "moe.experts.down"
    }  # fmt: skip
    assert {dtype for n, dtype in dtypes.items() if n.endswith("scale")} == {torch.float32}
    rest = {dtype for n, dtype in dtypes.items() if n not in fp8 and not n.endswith("scale")}
    assert rest == {torch.bfloat16}
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("key", ["modules_to_not_convert", "ignored_layers"])
def test_modules_may_be_left_out(blocks, tmp_path, key):
    left_out = ["lm_head", "model.language_model.layers.0.self_attn", "layers.1.mlp.experts"]
    config = {name: value for name, value in CONFIG.items() if name != "modules_to_not_convert"} | {key: left_out}

    def keep(tensors: dict[str, torch.Tensor]) -> None:
        plain = load_file(blocks.path / "model.safetensors")
        for name in list(tensors):
            if "layers.0.self_attn" in name or "layers.1.mlp.experts" in name:
                del tensors[name]
                tensors |= {n: plain[n] for n in [name] if n in plain}

    write_fp8(blocks.path, tmp_path, published=False, config=config, change=keep)
    text = load_model(tmp_path, progress=False).config.text
    assert (text.fp8_attention, text.fp8_experts) == ({1}, {0})


@pytest.mark.parametrize(
    ("pattern", "module", "quantised"),
    [
        ("mlp.gate", "layers.0.mlp.gate_up_proj", True),
        ("mlp.gate", "layers.0.mlp.gate", False),
        ("model.layers.1", "model.layers.11.self_attn.q_proj", True),
        ("model.layers.1", "model.layers.1.self_attn.q_proj", False),
        ("layers.1", "model.layers.1.self_attn.q_proj", True),
        ("experts", "model.layers.1.mlp.experts", False),
        (r"model.layers.\d+.self_attn", "model.layers.11.self_attn.q_proj", False),
        ("lm_head|model.visual", "model.visual.merger", False),
    ],
)
def test_patterns_match_as_in_transformers(pattern, module, quantised):
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    assert Fp8Config((pattern,)).quantises(module) == quantised
    assert utils.should_convert_module(module, [pattern]) == quantised


def test_what_transformers_itself_writes(blocks, tmp_path):
    """Its own FP8 modules, saved by itself, are the tensors and the declaration that are read here."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    write_fp8(blocks.path, tmp_path, published=False, scales=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    config = FineGrainedFP8Config(modules_to_not_convert=["lm_head", "model.visual"])
    theirs = fp8.replace_with_fp8_linear(
        copy.deepcopy(blocks.oracle), config.modules_to_not_convert, config, pre_quantized=True
    )
    theirs.load_state_dict(tensors, assign=True)
    theirs.config.quantization_config = config
    theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    ours, saved = load_model(tmp_path, progress=False), load_model(tmp_path / "theirs", progress=False)
    for (name, one), other in zip(ours.named_parameters(), saved.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name


def test_the_engine_answers(blocks, tmp_path):
    write_fp8(blocks.published, tmp_path, published=True)
    llm = LLM(tmp_path, device="cpu", progress=False, max_model_len=256)
    answers = [llm.generate("A b c", SamplingParams(max_tokens=6))[0].outputs[0].token_ids for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(answers[0]) > 0


def test_the_fp8_form_of_the_published_model(shared_dir, tmp_path):
    """Names, shapes and bytes of the 30B model in FP8."""
    raw = json.loads((shared_dir / "checkpoint-30b" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": CONFIG}))
    table = expand_table(Qwen3VLMoeConfig.from_pretrained(tmp_path))
    stored, sizes = {}, {"F8_E4M3": 1, "BF16": 2}

    def put(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        stored[name] = StoredTensor(tmp_path, dtype, shape, 0, sizes[dtype] * math.prod(shape))

    for entry in table:
        put(entry.source, "F8_E4M3" if entry.fp8 else "BF16", entry.shape)
        if entry.fp8:
            put(scale_name(entry.source), "BF16", entry.scale_shape_in("published"))
    assert sum(entry.fp8 for entry in table) == 48 * 6
    experts = "model.language_model.layers.7.mlp.experts"
    assert stored[f"{experts}.gate_up_proj_scale_inv"].shape == (128, 16, 12)
    assert stored[f"{experts}.down_proj_scale_inv"].shape == (128, 6, 16)
    assert stored["model.language_model.layers.7.self_attn.k_proj.weight_scale_inv"].shape == (4, 16)
    check_tensors(table, stored, tmp_path)
    assert find_expert_layout(table, stored, tmp_path) == "published"
    quantised = 48 * (128 * 3 * 2048 * 768 + 2048 * (4096 + 512 + 512) + 4096 * 2048)
    expected = 62_141_508_064 - quantised + 2 * quantised // 128**2
    assert sum(tensor.nbytes for tensor in stored.values()) == expected == 32_248_158_688
    with torch.device("meta"):
        model = Qwen3VLMoe(Qwen3VLMoeConfig.from_pretrained(tmp_path)).set_dtype(torch.bfloat16)
    scales = sum(parameter.nbytes for name, parameter in model.named_parameters() if name.endswith("scale"))
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held - scales // 2 == sum(tensor.nbytes for tensor in stored.values())  # scales are widened to float32


# --- what is refused ---

LAYER = "model.language_model.layers.0"
GATE_UP, DOWN, QUERY = (
    f"{LAYER}.mlp.experts.gate_up_proj",
    f"{LAYER}.mlp.experts.down_proj",
    f"{LAYER}.self_attn.q_proj",
)


def drop(name):
    return lambda tensors: tensors.pop(name)


def put(name, made):
    return lambda tensors: tensors.__setitem__(name, made(tensors))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (drop(f"{GATE_UP}_scale_inv"), f"1 missing: {GATE_UP}_scale_inv"),
        (drop(f"{QUERY}.weight_scale_inv"), f"1 missing: {QUERY}.weight_scale_inv"),
        (put(f"{LAYER}.mlp.gate.weight_scale_inv", lambda t: torch.ones(1, 2)), "1 unexpected: "),
        (put("lm_head.weight_scale_inv", lambda t: torch.ones(4, 2)), "1 unexpected: lm_head.weight_scale_inv"),
        (
            put(f"{GATE_UP}_scale_inv", lambda t: t[f"{DOWN}_scale_inv"].clone()[:, :1, :1].contiguous()),
            "1 of the wrong shape: ",
        ),
        (put(f"{GATE_UP}_scale_inv", lambda t: torch.ones(())), "_scale_inv [] instead of [4, 2, 2]"),
        (put(f"{QUERY}.weight_scale_inv", lambda t: torch.ones(1)), "weight_scale_inv [1] instead of [1, 2]"),
        (put(f"{QUERY}.weight_scale_inv", lambda t: torch.ones(2, 1)), "weight_scale_inv [2, 1] instead of [1, 2]"),
        (put(f"{QUERY}.weight", lambda t: t[f"{QUERY}.weight"].float()), "(config.json declares FP8): "),
        (put(f"{GATE_UP}", lambda t: torch.zeros_like(t[GATE_UP], dtype=torch.int8)), "(config.json declares FP8): "),
        (put(f"{QUERY}.weight_scale_inv", lambda t: torch.ones(1, 2).half()), "(only BF16, F32 can be loaded): "),
        (put("lm_head.weight", lambda t: t["lm_head.weight"].to(torch.float8_e4m3fn)), "lm_head.weight F8_E4M3"),
        (put(f"{QUERY}.weight_scale_inv", lambda t: torch.full((1, 2), -1.0)), "negative or not finite"),
        (put(f"{QUERY}.weight_scale_inv", lambda t: torch.full((1, 2), float("nan"))), "negative or not finite"),
    ],
)
def test_malformed_pairs(blocks, tmp_path, change, text):
    write_fp8(blocks.path, tmp_path, published=False, change=change)
    assert text in message(tmp_path)


def test_scales_that_lie_the_other_way_round(make_tiny, tmp_path):
    """Those of down_proj [E, 144, 80] are [E, 2, 1]: transposed, they would fit the other layout."""
    blocks = make_tiny("blocks")
    turn = put(f"{DOWN}_scale_inv", lambda t: t[f"{DOWN}_scale_inv"].transpose(1, 2).contiguous())
    write_fp8(blocks.path, tmp_path, published=False, change=turn)
    text = message(tmp_path)
    assert f"{DOWN}_scale_inv [4, 1, 2] lies the other way round than its weights [4, 144, 80]" in text
    assert "'transformers5': [4, 2, 1] is needed" in text


def test_fp8_weights_without_a_declaration(blocks, tmp_path):
    write_fp8(blocks.path, tmp_path, published=False)
    shutil.copy(blocks.path / "config.json", tmp_path / "config.json")
    text = message(tmp_path)
    assert "F8_E4M3" in text
    assert "unexpected" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quant_method": "compressed-tensors"}, "quant_method is 'compressed-tensors'; only 'fp8' is supported"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"quant_method": None}, "quant_method is None"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'; only 'e4m3' is supported"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'; only 'dynamic'"),
        ({"weight_block_size": [64, 128]}, "weight_block_size is [64, 128]; only [128, 128]"),
        ({"weight_block_size": None}, "weight_block_size is None"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({"bits": 4}, "bits is 4, which is not known here"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'; a list of module names"),
        ({"modules_to_not_convert": ["["]}, "holds '[', which is no pattern"),
        ({"modules_to_not_convert": [r"(\w+\.?)+!"]}, "patterns may have no groups and at most 3 of * + ?"),
        ({"ignored_layers": [".*.*.*.*!"]}, "holds '.*.*.*.*!'; patterns may have no groups"),
        ({"ignored_layers": [r"\\(a+)+!"]}, "patterns may have no groups"),
        ({"ignored_layers": [f"{i}.*" for i in range(65)]}, "hold 65 patterns with * + or ?, more than 64"),
        ({"modules_to_not_convert": ["k_proj"]}, "k_proj is left out and "),
    ],
)
def test_other_quantisations_are_refused_by_name(blocks, tmp_path, changes, text):
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    write_fp8(blocks.path, tmp_path, published=False, config=config)
    assert text in message(tmp_path, ConfigError)
