"""Each product by value on a Hopper GPU: every tile that its card's files name, every width, and very many values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tma_moe
from tests.kernels.on_hopper import (
    MARKS,
    MISSING,
    E,
    H,
    I,
    K,
    assert_as_good_as_the_dtype,
    in_float32,
    make_experts,
    make_inputs,
)
from tma_moe import support
from tma_moe.tiles import (
    CONFIG_DIR,
    FP8_KERNELS,
    FP8_MANY_DOWN,
    FP8_MANY_UP,
    MANY_DOWN,
    MANY_UP,
    Choice,
    Tiles,
    default_choices,
    load,
)

pytest.importorskip("triton")
from tma_moe.recipe import make_recipe

pytestmark = MARKS
# Beside a product under test: plain Triton, of a tile that no file names.
PARTNER = {
    "gemv": Tiles("gemv", 1, 4, 128, 4, 1),
    "fp8_gemv": Tiles("fp8_gemv", 1, 4, 128, 4, 1),
    "fp8_weights_m": Tiles("fp8_weights_m", 32, 64, 128, 4, 3),
}
PLAIN = Tiles("weights_m", 64, 64, 64, 4, 3)
FAR = 131_072 + 512  # tokens: at 131,072 of them T * K * 2048 is 2 ** 31
FP8_TOKENS_M_WS = tuple(Tiles("fp8_tokens_m_ws", 128, cols, 128, 4, 4, 1) for cols in (128, 256))
TOKENS_M_WS = (Tiles("tokens_m_ws", 128, 64, 64, 4, 3, 1), Tiles("tokens_m_ws", 128, 128, 64, 4, 3, 1))


def weights_m_ws(rows: int, **more: bool) -> tuple[Tiles, Tiles]:
    up, down = (Tiles("weights_m_ws", rows, cols, 64, 4, 4, 1, **more) for cols in (64, 128))
    return up, down


def skip_without_gluon(*tiles: Tiles) -> None:
    problem = support.gluon_problem()
    if problem is not None and any(chosen.kernel in support.GLUON_PRODUCTS for chosen in tiles):
        pytest.skip(f"no Gluon here: {problem}")


def run(choice: Choice, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: tma_moe.ExpertWeights):
    """The operation with given tiles, in memory where what is never written shows as NaN."""
    num_experts, hidden, width = experts.down.shape
    recipe = make_recipe(x.device, num_experts, ids.shape[1], hidden, width, choice)
    for columns in (hidden, width):
        x.new_full((ids.numel(), columns), float("nan"))
    torch.full_like(x, float("nan"))
    return recipe.run(x, ids, weights, experts)


@pytest.fixture(scope="module")
def experts():
    return make_experts()


@pytest.fixture(scope="module")
def float32_weights(experts):
    return in_float32(experts)


@pytest.fixture(scope="module")
def fp8_experts():
    return make_experts(dtype=tma_moe.FP8)


def in_files() -> dict[str, tuple[str, Tiles, int]]:
    """Each role and tile that the files of this card name, for any triton, and tokens from its bucket's middle.

    The last bucket has no end: there twice as many as the one below takes. Of a tile that several buckets name the
    largest counts. Without a card: what an H200 would run.
    """
    device = torch.cuda.get_device_name() if MISSING is None else "NVIDIA H200"
    files = [file for file in map(load, sorted(CONFIG_DIR.glob("*.json"))) if device in file["devices"]]
    listed = [choices for file in files for shape, choices in file["shapes"] if shape == (E, K, H, I)]
    found = {}
    for choices in listed or [default_choices(E, K, H, I)]:
        below = 0
        for choice in choices:
            tokens = (below + choice.max_tokens + 1) // 2 if choice.max_tokens else 2 * below
            for role in ("up", "down"):
                t = getattr(choice, role)
                how = f"{t.rows}x{t.cols}x{t.block_k}-w{t.warps}-s{t.stages}-c{t.ctas_per_sm}"
                found[f"{role}-{t.kernel}-{how}{'-flat' * t.flatten}{'-keep' * t.keep}"] = (role, t, tokens)
            below = choice.max_tokens
    return found


IN_FILES = in_files()


@pytest.mark.parametrize("name", IN_FILES)
def test_every_tile_of_the_files_by_value(name, experts, float32_weights, fp8_experts):
    """Alone beside a plain partner, so that a wrong product is the one that the test names."""
    role, tiles, T = IN_FILES[name]
    skip_without_gluon(tiles)
    partner = PARTNER.get(tiles.kernel, PLAIN)
    if tiles.kernel == "fp8_tokens_m_ws":  # which has no other partner
        partner = replace(tiles, cols=256 if role == "up" else 128, keep=False)
    if tiles.kernel in ("portable", "fp8_portable"):  # nor have these
        partner = Tiles(tiles.kernel, 16, 128, 128, 4, 2, weights_m=True)
    if tiles.kernel in (*FP8_KERNELS, "fp8_portable"):
        experts, float32_weights = fp8_experts, in_float32(fp8_experts)
    choice = Choice(None, tiles, partner) if role == "up" else Choice(None, partner, tiles)
    inputs = make_inputs(T)
    y = run(choice, *inputs, experts)
    assert_as_good_as_the_dtype(y, *inputs, experts, float32_weights)
    assert torch.equal(run(choice, *inputs, experts), y)


@pytest.mark.parametrize("rows", [96, 160, 288])
def test_tiles_of_every_width(rows):
    """Experts of as many rows as there are edges of tile widths, with sizes that are no multiple of a block."""
    choice = Choice(None, *weights_m_ws(rows, keep=True))
    skip_without_gluon(choice.up)
    edges = (32, 64, 96, 128, 160, 192, 256, 288, 576, 1152)
    counts = [0, 1, *(edge + beside for edge in edges for beside in (-1, 0, 1)), 1600]
    experts = make_experts(sizes=(len(counts), 264, 136))
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].to("cuda", torch.int32)[:, None]
    x = make_inputs(len(ids), sizes=(len(counts), 1, 264))[0]
    weights = torch.rand(len(ids), 1, device="cuda") + 0.5
    y = run(choice, x, ids, weights, experts)
    assert_as_good_as_the_dtype(y, x, ids, weights, experts, in_float32(experts))
    x[7] = float("nan")
    dirty = run(choice, x, ids, weights, experts)
    assert dirty[7].isnan().all()
    dirty[7] = y[7]
    assert torch.equal(dirty, y)


@pytest.mark.parametrize(
    ("up", "down"),
    [
        pytest.param(MANY_UP, MANY_DOWN, id="weights_m"),
        pytest.param(*weights_m_ws(288), id="weights_m_ws"),
        pytest.param(*TOKENS_M_WS, id="tokens_m_ws"),
        pytest.param(FP8_MANY_UP, FP8_MANY_DOWN, id="fp8_weights_m"),
        pytest.param(*FP8_TOKENS_M_WS, id="fp8_tokens_m_ws"),
    ],
)
@pytest.mark.parametrize(("hidden", "width"), [(2048, 128), (64, 2048)], ids=["rows", "h"])
def test_more_values_than_31_bits_count(hidden, width, up, down):
    """What either product stores has more than 2 ** 31 values; a place in it that is computed in 32 bits is wrong.

    Every token goes to all of 8 experts, so that each has FAR rows, and the last tokens' lie at the end of both
    buffers. The gemv kernels take no such load: their grid has a pair a program in a direction that ends at 65,535.
    """
    skip_without_gluon(up, down)
    assert FAR * 8 * max(hidden, width) > 2**31
    experts = make_experts(sizes=(8, hidden, width), dtype=tma_moe.FP8 if up.kernel in FP8_KERNELS else torch.bfloat16)
    x, ids, weights = make_inputs(FAR, sizes=(8, 8, hidden))
    y = run(Choice(None, up, down), x, ids, weights, experts)
    assert y.isfinite().all()
    for first in (0, FAR // 2 - 32, FAR - 64):
        part = slice(first, first + 64)
        assert_as_good_as_the_dtype(y[part], x[part], ids[part], weights[part], experts, in_float32(experts))
