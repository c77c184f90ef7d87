"""Values of the kernels, against the reference in float64.

The same tests run on a GPU (bf16, fp16) and in triton's interpreter (fp16, fp32; its bf16 products are wrong).
The interpreter must be chosen before triton is imported, so test_interpreter.py runs this file in a process of its own.

A result passes if its error is at most twice the error that the reference makes in the same dtype: that is what
rounding to the dtype costs, and nothing was tuned.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tma_moe
from tma_moe import support
from tma_moe.reference import fused_moe_reference
from tma_moe.tiles import Choice, Tiles

if support.interpreting():
    DEVICE, DTYPES = "cpu", (torch.float32, torch.float16)
else:
    DEVICE, DTYPES = "cuda", (torch.bfloat16, torch.float16)
# On a card other than Hopper's the portable kernels alone, and what they share with the others.
RUNNING = [name for name in ("tma", "triton") if tma_moe.unavailable(DEVICE, DTYPES[0], backend=name) is None]
MISSING = None if RUNNING else tma_moe.unavailable(DEVICE, DTYPES[0], backend="triton")
BACKEND = RUNNING[0] if RUNNING else "triton"
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}; test_interpreter.py runs this file on the CPU")


def both(name: str, up: Tiles, down: Tiles) -> object:
    return pytest.param(Choice(None, up, down), id=name)


GEMV = Choice(None, Tiles("gemv", 1, 16, 32, 4, 1), Tiles("gemv", 1, 32, 16, 4, 1))
CHOICES = [
    pytest.param(GEMV, id="gemv"),
    both("weights_m", Tiles("weights_m", 16, 64, 32, 4, 3), Tiles("weights_m", 16, 64, 16, 4, 3)),
    both(
        "weights_m-persistent",
        Tiles("weights_m", 32, 64, 32, 4, 3, ctas_per_sm=1, flatten=True, keep=True),
        Tiles("weights_m", 16, 128, 16, 4, 3, ctas_per_sm=1, flatten=True, keep=True),
    ),
    both(
        "weights_m-of-two-heights",
        Tiles("weights_m", 16, 64, 16, 4, 2),
        Tiles("weights_m", 64, 64, 32, 4, 2, ctas_per_sm=1),
    ),
    both(
        "weights_m-many-rows",
        Tiles("weights_m", 64, 64, 32, 4, 3, ctas_per_sm=1, flatten=True),
        Tiles("weights_m", 128, 128, 16, 8, 3),
    ),
    both(
        "portable-weights_m",
        Tiles("portable", 16, 64, 32, 4, 3, weights_m=True, keep=True),
        Tiles("portable", 32, 16, 16, 4, 3, weights_m=True),
    ),
    both("portable-tokens_m", Tiles("portable", 64, 16, 16, 4, 3), Tiles("portable", 32, 64, 32, 4, 3, keep=True)),
]
if not support.interpreting() and support.gluon_problem() is None:
    # Gluon has no interpreter: on a GPU only.
    PLAIN_UP, PLAIN_DOWN = Tiles("weights_m", 16, 64, 64, 4, 3), Tiles("weights_m", 32, 128, 64, 4, 3)
    CHOICES += [
        both(
            "weights_m_ws",
            Tiles("weights_m_ws", 96, 64, 64, 4, 4, ctas_per_sm=1, keep=True),
            Tiles("weights_m_ws", 160, 128, 64, 4, 4, ctas_per_sm=1, keep=True),
        ),
        both("weights_m_ws-then-plain", Tiles("weights_m_ws", 288, 64, 64, 4, 3, ctas_per_sm=1), PLAIN_DOWN),
        both(
            "tokens_m_ws",
            Tiles("tokens_m_ws", 128, 64, 64, 4, 3, ctas_per_sm=1),
            Tiles("tokens_m_ws", 128, 128, 64, 4, 3, ctas_per_sm=1),
        ),
        both("plain-then-tokens_m_ws", PLAIN_UP, Tiles("tokens_m_ws", 128, 256, 64, 4, 4, ctas_per_sm=1)),
    ]
if RUNNING == ["triton"]:
    CHOICES = [choice for choice in CHOICES if choice.id.startswith(("gemv", "portable"))]


class Problem:
    """Random operands on the device under test, and their results by the reference."""

    def __init__(self, T, E=5, K=2, H=40, I=24, *, dtype=DTYPES[0], ids=None, scale=1.0, seed=0):  # noqa: E741
        generator = torch.Generator().manual_seed(seed)
        self.experts = tma_moe.ExpertWeights(E, H, I, dtype=dtype)
        self.experts.gate_up.data.normal_(std=H**-0.5, generator=generator)
        self.experts.down.data.normal_(std=I**-0.5, generator=generator)
        self.x = (scale * torch.randn(T, H, generator=generator)).to(dtype)
        probs = torch.softmax(torch.randn(T, E, generator=generator), -1)
        self.weights, chosen = probs.topk(K, dim=-1)
        self.ids = (chosen if ids is None else ids).int()
        self.experts.to(DEVICE)
        self.x, self.ids, self.weights = self.x.to(DEVICE), self.ids.to(DEVICE), self.weights.to(DEVICE)

    def run(self, choice: Choice, **options: bool) -> torch.Tensor | tma_moe.Uncombined:
        from tma_moe.recipe import make_recipe

        E, H, I = self.experts.down.shape  # noqa: E741
        recipe = make_recipe(self.x.device, E, self.ids.shape[1], H, I, choice)
        return recipe.run(self.x, self.ids, self.weights, self.experts, **options)

    def reference(self, dtype: torch.dtype) -> torch.Tensor:
        gate_up, down = self.experts.gate_up.to(dtype), self.experts.down.to(dtype)
        return fused_moe_reference(self.x.to(dtype), self.ids, self.weights, gate_up, down).double()

    def check(self, choice: Choice, rows=slice(None)) -> None:
        exact = self.reference(torch.float64)[rows]
        allowed = (self.reference(self.x.dtype)[rows] - exact).abs()
        error = (self.run(choice).double()[rows] - exact).abs()
        assert error.max() <= 2 * allowed.max(), f"max error {error.max():.3g}, of the dtype {allowed.max():.3g}"
        assert error.square().mean().sqrt() <= 2 * allowed.square().mean().sqrt()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(choice, dtype):
    Problem(19, dtype=dtype).check(choice)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 65])
def test_token_counts_around_the_tile_edges(choice, T):
    if choice is GEMV and T > 1 and DEVICE == "cpu":
        pytest.skip("the gemv kernels have no row tiles, and many programs are slow in the interpreter")
    # One expert gets every token, so its rows are exactly T.
    ids = torch.stack([torch.full((T,), 3), torch.arange(T) % 3], dim=1)
    Problem(T, ids=ids).check(choice)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    ("E", "K", "H", "I"),
    [
        pytest.param(3, 1, 16, 16, id="k=1"),
        pytest.param(6, 6, 24, 40, id="k=E"),
        pytest.param(11, 3, 72, 8, id="narrow-experts"),
        pytest.param(1, 1, 8, 136, id="one-wide-expert"),
    ],
)
def test_shapes(choice, E, K, H, I):  # noqa: E741
    Problem(18, E, K, H, I).check(choice)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("H", "I"), [(37, 19), (10, 33)])
def test_sizes_that_no_tile_divides(choice, H, I):  # noqa: E741
    if choice.up.kernel.startswith(("weights_m", "tokens_m")):
        pytest.skip("TMA needs rows of whole 16 bytes")
    Problem(18, H=H, I=I).check(choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_all_tokens_to_one_expert_and_the_others_empty(choice):
    Problem(18, K=1, ids=torch.full((18, 1), 4)).check(choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_large_inputs(choice):
    # Gate values in the thousands: the sigmoid saturates both ways and exp overflows to infinity on one side.
    problem = Problem(9, scale=1000.0)
    assert problem.run(choice).isfinite().all()
    problem.check(choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_nan_stays_in_its_row(choice):
    problem = Problem(18)
    clean = problem.run(choice)
    problem.x[5, 3] = float("nan")
    y = problem.run(choice)
    assert y[5].isnan().all()
    others = torch.arange(18, device=y.device) != 5
    assert torch.equal(y[others], clean[others])


@pytest.fixture
def row_by_row_products(monkeypatch):
    """The interpreter multiplies tiles with NumPy's BLAS, which may round a row differently at another place of its
    tile, as no tensor core does. Products added up in order take that away, and leave what the kernels do."""
    if DEVICE == "cpu":

        def matmul(a, b, dtype):
            a, b = a.astype(dtype), b.astype(dtype)
            return sum((a[:, k, None] * b[k] for k in range(1, len(b))), a[:, :1] * b[:1])

        monkeypatch.setattr(np, "matmul", matmul)


@pytest.mark.usefixtures("row_by_row_products")
@pytest.mark.parametrize("choice", CHOICES)
def test_bitwise_equal_from_run_to_run_and_in_any_company(choice):
    problem = Problem(23)
    together = problem.run(choice)
    assert torch.equal(problem.run(choice), together)
    x, ids, weights = problem.x, problem.ids, problem.weights
    for rows in (slice(7, 8), slice(3, 21)):
        problem.x, problem.ids, problem.weights = x[rows].clone(), ids[rows].clone(), weights[rows].clone()
        assert torch.equal(problem.run(choice), together[rows])


@pytest.mark.parametrize("choice", CHOICES)
def test_ids_outside_the_experts_are_skipped(choice):
    problem = Problem(18)
    problem.ids[4, 0] = 5
    problem.ids[9, 1] = -1
    problem.ids[11] = 1 << 20
    problem.check(choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_pair_goes_to_an_expert(choice):
    """There is no tile at all, and what lies in memory where the plan would have them must not be taken for one."""
    problem = Problem(18)
    problem.ids.fill_(-1)
    problem.x.fill_(float("nan"))
    torch.full((1 << 18,), 1 << 30, dtype=torch.int32, device=problem.x.device)  # memory that the plan may get
    assert (problem.run(choice) == 0).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_other_dtypes_of_ids_and_weights(choice):
    problem = Problem(7, dtype=torch.float16)
    problem.ids, problem.weights = problem.ids.long(), problem.weights.half()
    problem.check(choice)


@pytest.mark.parametrize("choice", CHOICES)
def test_skipped_tokens_stay_zero_whatever_they_hold(choice):
    """A batch that is padded to a size routes what pads it to nobody: no product may read it, and the sum is zero."""
    problem = Problem(18)
    skip = torch.zeros(18, dtype=torch.bool, device=problem.x.device)
    skip[[0, 5, 16, 17]] = True
    logits = torch.randn(18, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    problem.ids, problem.weights = tma_moe.route(logits, 2, skip_T=skip, backend=BACKEND)
    problem.x[skip] = float("nan")
    problem.check(choice)
    assert (problem.run(choice)[skip] == 0).all()


@pytest.mark.parametrize("choice", CHOICES)
def test_the_sum_may_be_left_to_the_caller(choice):
    problem = Problem(18)
    problem.ids[4] = 5
    rows, whole = problem.run(choice, combine=False), problem.run(choice)
    if choice.up.kernel == "gemv":  # its down product takes the sum by itself
        assert torch.equal(rows, whole)
        return
    assert isinstance(rows, tma_moe.Uncombined)
    assert (rows.num_experts, rows.kept) == (5, choice.down.keep)
    for part, y in ((rows, whole), (rows[torch.tensor([16, 4])], whole[[16, 4]])):
        real = (part.ids_TK >= 0) & (part.ids_TK < 5)
        weights = part.weights_TK.masked_fill(~real, 0.0)
        of_experts = part.rows_TKH.masked_fill(~real[..., None], 0.0).double()
        total = (weights[..., None].double() * of_experts).sum(1)
        # Both add up the same rows, the kernel in float32, and round the sum to their dtype.
        bound = (weights[..., None].double() * of_experts.abs()).sum(1) * 2 * torch.finfo(y.dtype).eps
        assert ((y.double() - total).abs() <= bound).all()


@pytest.mark.parametrize("backend", RUNNING)
def test_public_op_uses_the_bucket_of_the_call(backend):
    problem = Problem(5)
    y = tma_moe.fused_moe(problem.x, problem.ids, problem.weights, problem.experts, backend=backend)
    exact = problem.reference(torch.float64)
    allowed = (problem.reference(problem.x.dtype) - exact).abs().max()
    assert (y.double() - exact).abs().max() <= 2 * allowed
    skip = torch.arange(5, device=problem.x.device) > 2
    ids, weights = tma_moe.route(torch.randn(5, 5, device=DEVICE), 2, skip_T=skip, backend=backend)
    for rows in (5, 3):  # in two buckets
        y = tma_moe.fused_moe(problem.x[:rows], ids[:rows], weights[:rows], problem.experts, backend=backend)
        assert (y == 0).all(dim=1).tolist() == skip[:rows].tolist()
    empty = tma_moe.fused_moe(problem.x[:0], problem.ids[:0], problem.weights[:0], problem.experts, backend=backend)
    assert empty.shape == (0, 40)


@pytest.mark.parametrize("backend", RUNNING)
def test_gradients_are_refused(backend):
    problem = Problem(3)
    problem.x.requires_grad_()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        tma_moe.fused_moe(problem.x, problem.ids, problem.weights, problem.experts, backend=backend)
    with torch.no_grad():
        tma_moe.fused_moe(problem.x, problem.ids, problem.weights, problem.experts, backend=backend)


@pytest.mark.parametrize("few", [(64, 256), (256,), (16, 32)], ids=["second-block", "one-block", "counted"])
@pytest.mark.parametrize("kernels", [("weights_m", "weights_m_ws"), ("weights_m_ws", "weights_m")])
def test_plan(monkeypatch, few, kernels):
    """The invariants of grouping: rows sorted by expert and stable, tiles that cover every row once."""
    from tma_moe import routing
    from tma_moe.gemm.product import Product, Sizes
    from tma_moe.launcher import current_stream

    monkeypatch.setattr(routing, "FEW_BLOCKS", few)
    monkeypatch.setattr(routing, "MANY_BLOCKS", 8)
    monkeypatch.setattr(routing, "SUB", 16)
    monkeypatch.setattr(routing, "CHUNK", 4)
    problem = Problem(73, E=6, K=3)
    problem.ids[problem.ids == 2] = 1  # an empty expert
    problem.ids[:, 2] = 3  # a large one
    problem.ids[7, 0] = 6  # ids that are no expert
    problem.ids[8] = -1
    # Only their tiles: kernels in Gluon cannot be made everywhere.
    made = {"weights_m": (Tiles("weights_m", 16, 64, 16, 4, 2), 16)}
    made["weights_m_ws"] = (Tiles("weights_m_ws", 96, 64, 64, 4, 2), 32)
    products = [Product(made[kernel][0], Sizes(6, 3, 40, 24, 2), 1, made[kernel][1]) for kernel in kernels]
    up, down = products
    pairs = problem.ids.numel()
    bounds = [product.row_tiles(pairs) for product in products]
    pdl = support.has_pdl(problem.x.device)
    grouping = routing.Grouping(6, (up.tiles.rows, up.step, down.tiles.rows, down.step), pdl)
    plan, *at = grouping(current_stream(problem.x.device), problem.ids, *bounds)
    assert at[0] == routing.HEADER.value + pairs
    assert at[1] == at[0] + 4 * bounds[0]
    assert len(plan) == at[1] + 4 * bounds[1]
    plan, ids = plan.cpu(), problem.ids.flatten().cpu()
    valid = (ids >= 0) & (ids < 6)
    expected = torch.argsort(ids[valid], stable=True)
    slots = torch.arange(pairs)[valid][expected]
    first_row = routing.HEADER.value
    assert torch.equal(plan[first_row : first_row + slots.numel()].long(), slots)
    for role, product in enumerate(products):
        tiles = plan[at[role] : at[role] + 4 * int(plan[role])].view(-1, 4).tolist()
        assert len(tiles) <= bounds[role]
        covered = []
        by_expert: dict[int, list[int]] = {}
        for expert, first, last, _ in tiles:
            assert 0 < last - first <= product.tiles.rows
            assert (ids[slots[first:last]] == expert).all()
            covered += range(first, last)
            by_expert.setdefault(expert, []).append(last - first)
        assert covered == list(range(slots.numel()))
        for heights in by_expert.values():
            # As few tiles as can be, all of one height but the last, a multiple of the step.
            assert len(heights) == -(-sum(heights) // product.tiles.rows)
            assert len(set(heights[:-1])) <= 1
            assert all(height % product.step == 0 for height in heights[:-1])
            assert heights[-1] <= heights[0]
        neighbours = [
            (m, min(4, len(heights) - m // 4 * 4)) for heights in by_expert.values() for m in range(len(heights))
        ]
        assert [(word // 8, word % 8) for *_, word in tiles] == [(m % 4, n) for m, n in neighbours]
        assert max(len(heights) for heights in by_expert.values()) > (4 if product.step == 16 else 0)


@pytest.mark.parametrize("few", [(64,), (4,)], ids=["one-block", "counted"])
def test_plan_without_a_row(monkeypatch, few):
    """Where kernels look for a first tile, and one before it, the plan says 0 of 1 neighbours, whatever lay there."""
    from tma_moe import routing
    from tma_moe.launcher import current_stream

    monkeypatch.setattr(routing, "FEW_BLOCKS", few)
    monkeypatch.setattr(routing, "SUB", 4)
    ids = torch.full((5, 2), -1, dtype=torch.int32, device=DEVICE)
    grouping = routing.Grouping(3, (16, 16, 96, 32), support.has_pdl(torch.device(DEVICE)))
    plan, up_at, down_at = grouping(current_stream(ids.device), ids, 3, 3)
    assert plan[:2].tolist() == [0, 0]
    assert [plan[at + beside].item() for at in (up_at, down_at) for beside in (-1, 3)] == [1] * 4


@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (70, 5, 5), (9, 130, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_route(T, E, k, dtype):
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids, weights = (t.cpu() for t in tma_moe.route(logits.to(DEVICE), k, backend=BACKEND))
    expected_ids, _ = tma_moe.route(logits, k, backend="reference")
    exact = torch.softmax(logits.double(), -1).gather(1, ids.long())
    exact = exact / exact.sum(-1, keepdim=True)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(ids, expected_ids)
    else:  # ties: torch.topk on the CPU may take other ids, of equal probability
        chosen, expected = (logits.float().gather(1, i.long()) for i in (ids, expected_ids))
        assert torch.equal(chosen, expected)
    assert (weights - exact).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("T", "E", "k"), [(0, 8, 2), (1, 8, 2), (5, 8, 8), (70, 5, 3), (200, 130, 8)])
@pytest.mark.parametrize("which", ["none", "some", "all"])
def test_route_skips_tokens(T, E, k, which):
    """A skipped token's ids are -1, and nothing else changes; also at an address that a kernel cannot rely on."""
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    skip = {"none": torch.zeros(T), "some": torch.arange(T) % 3 == 1, "all": torch.ones(T)}[which].bool()
    plain_ids, plain_weights = tma_moe.route(logits, k, backend=BACKEND)
    everywhere = torch.zeros(2, T + 1, dtype=torch.bool, device=DEVICE)
    everywhere[:, 1:] = skip.to(DEVICE)
    columns = everywhere[:, 1:].T.contiguous()
    for given in (skip.to(DEVICE), everywhere[0, 1:], columns[:, 0]):
        ids, weights = tma_moe.route(logits, k, skip_T=given, backend=BACKEND)
        assert ids.dtype == torch.int32
        assert torch.equal(ids, plain_ids.masked_fill(skip.to(DEVICE)[:, None], -1))
        assert torch.equal(weights, plain_weights)


def test_route_ties_take_the_lowest_ids_and_nan_stays_in_its_row():
    logits = torch.zeros(3, 6)
    logits[1, 4] = 1.0
    logits[2, 1] = float("nan")
    ids, weights = (t.cpu() for t in tma_moe.route(logits.to(DEVICE), 3, backend=BACKEND))
    assert ids[:2].tolist() == [[0, 1, 2], [4, 0, 1]]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[2].isnan().all()
    assert ((ids[2] >= 0) & (ids[2] < 6)).all()
    assert weights[:2].isfinite().all()


def test_route_of_extreme_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0, 9e3], [-1e30, -1e30, -1e30, -2e30]])
    ids, weights = (t.cpu() for t in tma_moe.route(logits.to(DEVICE), 2, backend=BACKEND))
    # All but one probability underflow to zero in the first row: a tie, which the lowest id wins, as in torch.topk.
    assert ids.tolist() == [[0, 1], [0, 1]]
    assert weights.tolist() == [[1.0, 0.0], [0.5, 0.5]]


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if "portable" in str(choice.id)])
@pytest.mark.parametrize("divided", ["experts", "width"])
def test_ranks_that_hold_a_part_of_the_experts_add_up(choice, divided):
    """Some experts each, with ids counted from the first of them, or a part of the width of every expert."""
    whole = Problem(18, E=6)
    E, H, I = whole.experts.down.shape  # noqa: E741
    total, ids = torch.zeros(18, H, dtype=torch.float64), whole.ids
    for rank in range(2):
        part = Problem(18, E=6)
        held = slice(rank * E // 2, (rank + 1) * E // 2) if divided == "experts" else slice(0, E)
        width = slice(rank * I // 2, (rank + 1) * I // 2) if divided == "width" else slice(0, I)
        gate, up = whole.experts.gate_up.data[held].chunk(2, dim=1)
        rows = torch.cat([gate[:, width], up[:, width]], dim=1)
        down = whole.experts.down.data[held][:, :, width].contiguous()
        part.experts = tma_moe.ExpertWeights.from_checkpoint(rows, down, "transformers5")
        part.ids = ids - held.start
        rows_of_rank = part.run(choice, combine=False)
        assert isinstance(rows_of_rank, tma_moe.Uncombined)
        total += rows_of_rank.combined().double().cpu()
    exact = whole.reference(torch.float64).cpu()
    allowed = (whole.reference(whole.x.dtype).cpu() - exact).abs()
    assert (total - exact).abs().max() <= 4 * allowed.max()  # twice that of each of two ranks
