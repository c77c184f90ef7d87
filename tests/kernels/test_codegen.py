"""Every kernel with every shipped choice of tiles, compiled for Hopper on a machine without a GPU.

That catches what no value test sees: a product that fell back to the old tensor-core instructions, operands that pass
through registers, spilled registers, a tile that no longer fits into shared memory, TMA that silently became ordinary
loads. Weights are promised by TMA except to the gemv kernels; tokens come by TMA to the down products in Gluon only.
"""

from __future__ import annotations

import re

import pytest
import torch

from tma_moe import support
from tma_moe.tiles import CONFIG_DIR, Choice, choices_for, default_choices, fp8_default_choices, load

triton = pytest.importorskip("triton")
if support.interpreting():
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from tests.kernels.codegen import Compiled, compile_for_hopper, disassemble, kernels_of  # noqa: E402
from tma_moe import routing  # noqa: E402

LARGE = 4096  # tokens of a call of the last bucket
SHARED_MEMORY = 232_448  # bytes a block may have on sm_90
PRODUCTS = {
    "weights_m_up": 2,
    "weights_m_down": 1,
    "fp8_weights_m_up": 2,
    "fp8_weights_m_down": 1,
}  # TMA loads in one step along K
# The least number of TMA loads in the text of a kernel in Gluon; tokens of the up products are gathered.
GLUON_PRODUCTS = {
    "tokens_m_ws_up": 2,
    "tokens_m_ws_down": 2,
    "weights_m_ws_up": 3,
    "weights_m_ws_down": 9,
    "fp8_tokens_m_ws_up": 2,
    "fp8_tokens_m_ws_down": 2,
}

# They load before their turn: weights and, two launches after they were written, expert ids or the plan. Of the kernels
# in Gluon the text does not tell which warps load.
READ_EARLY = {"gemv_down", "fp8_gemv_down", *GLUON_PRODUCTS}


def shipped() -> dict[str, tuple[tuple[int, int, int, int], Choice, torch.dtype]]:
    """What this triton would be given: choices in configs/, and the defaults for two shapes, one of them in fp16."""
    found = {}
    files = [file for file in map(load, sorted(CONFIG_DIR.glob("*.json"))) if not file["portable"]]
    shapes = {(file["devices"][0], shape, choices[0].fp8) for file in files for shape, choices in file["shapes"]}
    for device, shape, fp8 in sorted(shapes):
        for choice in choices_for(device, triton.__version__, *shape, fp8=fp8):
            name = f"{device}-fp8-{choice.max_tokens}" if fp8 else f"{device}-{choice.max_tokens}"
            found[name] = (shape, choice, torch.bfloat16)
    for name, shape, dtype in (
        ("default", (128, 8, 2048, 768), torch.bfloat16),
        ("default-mixtral", (8, 2, 4096, 14336), torch.float16),
    ):
        for choice in default_choices(*shape):
            found[f"{name}-{choice.max_tokens}"] = (shape, choice, dtype)
    for choice in fp8_default_choices(60, 4, 2048, 1408 - 48):  # experts whose width is no multiple of 128
        found[f"default-fp8-{choice.max_tokens}"] = ((60, 4, 2048, 1408 - 48), choice, torch.float16)
    return found


SHIPPED = shipped()


@pytest.fixture(scope="module")
def compiled():
    """Compiled kernels by everything that they depend on: most are shared between choices."""
    return {}


def compile_all(name: str, patch, compiled) -> dict[str, Compiled]:
    (E, K, H, I), choice, dtype = SHIPPED[name]  # noqa: E741
    T = choice.max_tokens or LARGE
    made = {}
    for kernel_name, (kernel, args, constants, options) in kernels_of(choice, T, E, K, H, I, dtype, patch).items():
        key = (kernel_name, constants, tuple(options.items()), dtype)
        if key not in compiled:
            compiled[key] = compile_for_hopper(kernel, args, constants, options)
        made[kernel_name] = compiled[key]
    return made


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_choice(name, monkeypatch, compiled):
    shape, choice, _ = SHIPPED[name]
    T = choice.max_tokens or LARGE
    kernels = compile_all(name, monkeypatch, compiled)
    expected = {f"{choice.up.kernel}_up", f"{choice.down.kernel}_down"}
    if choice.grouped:
        expected |= {"combine"} | ({"quantise_rows"} if choice.up.kernel == "fp8_tokens_m_ws" else set())
        few = T * shape[1] <= max(routing.FEW_BLOCKS)
        expected |= {"group_few"} if few else {"count_pairs", "group_many"}
    assert set(kernels) == expected
    disassemble(kernels.values())
    for kernel_name, kernel in kernels.items():
        assert kernel.spilled == 0, f"{kernel_name} spills {kernel.spilled} bytes"
        assert kernel.shared <= SHARED_MEMORY, f"{kernel_name} needs {kernel.shared} bytes of shared memory"
        assert kernel.scratch == 0, f"{kernel_name} asks for global scratch memory, which needs an allocator"
        kernel.assert_takes_turn(reads_early=kernel_name in READ_EARLY)
        if kernel_name.endswith(("_up", "_down")):
            keep = (choice.up if kernel_name.endswith("_up") else choice.down).keep
            stores = re.findall(r"st\.global\S*", kernel.ptx)
            assert all(("evict_last" in store and "cache_hint" in store) == keep for store in stores), kernel_name
        if kernel_name in GLUON_PRODUCTS:
            assert kernel.count("wgmma.mma_async") > 0
            assert kernel.count("mma.sync") == 0
            assert kernel.count("cp.async.bulk.tensor") >= GLUON_PRODUCTS[kernel_name]
            assert kernel.count("setmaxnreg") > 0, f"{kernel_name} does not share out its registers"
        if kernel_name in PRODUCTS:
            tiles = choice.up if kernel_name.endswith("_up") else choice.down
            assert kernel.warps == tiles.warps
            assert kernel.count("wgmma.mma_async") > 0, f"{kernel_name} has no warpgroup MMA"
            assert kernel.count("mma.sync") == 0, f"{kernel_name} fell back to mma.sync"
            assert kernel.count("cp.async.bulk.tensor") >= PRODUCTS[kernel_name], f"{kernel_name} lost TMA loads"
            # Operands straight from shared memory: no operand of an MMA is loaded into registers first.
            assert not re.search(r"warp_group_dot [^:]*: tensor<[^>]*dot_op", kernel.ttgir)


def test_fp8_products_run_on_the_tensor_cores_of_fp8(monkeypatch, compiled):
    """Each step along K is summed by the tensor core alone, and added up in float32 registers."""
    kernels = [
        (kernel_name, kernel)
        for name, (_, choice, _) in SHIPPED.items()
        if choice.fp8 and choice.grouped
        for kernel_name, kernel in compile_all(name, monkeypatch, compiled).items()
        if kernel_name.startswith("fp8")
    ]
    disassemble(kernel for _, kernel in kernels)
    for kernel_name, kernel in kernels:
        products = re.findall(r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3 R\d+, [^;]*", kernel.sass)
        fresh = [product for product in products if "!UPT" in product]
        assert len(products) == 4 * len(fresh) > 0, kernel_name
        assert "HGMMA" not in kernel.sass
    assert len({kernel_name for kernel_name, _ in kernels}) == 4


@pytest.mark.parametrize(("E", "k"), [(128, 8), (8, 2)])
@pytest.mark.parametrize("logits", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "skips"), [(1, False), (1, True), (16, True)])
def test_routing(E, k, logits, tokens, skips):
    ids = torch.empty(16, dtype=torch.int32)
    skip = torch.empty(16, dtype=torch.uint8) if skips else ids
    arguments = (torch.empty(16, dtype=logits), skip, ids, torch.empty(16), 5)
    made = compile_for_hopper(routing.route_topk, arguments, (E, k, E, k, tokens, skips, True), {"num_warps": 4})
    assert made.spilled == 0
    assert (made.count("ld.global.b8") > 0) == skips, "which tokens to skip is read if it is given, and only then"
    made.assert_takes_turn(reads_early=False)


def test_gemv_loads_are_16_bytes_wide(monkeypatch, compiled):
    for name, (_, choice, _) in SHIPPED.items():
        if not choice.grouped:
            for kernel_name, kernel in compile_all(name, monkeypatch, compiled).items():
                assert re.search(r"ld\.global\S*evict_first\S*\.v4\.b32", kernel.ptx), kernel_name


def test_gate_and_up_meet_in_registers(monkeypatch, compiled):
    """No up product passes float32 values between threads: the activation finds a gate and its up in one thread."""
    seen = set()
    for name, (_, choice, _) in SHIPPED.items():
        if not choice.grouped or choice.fp8:
            continue
        kernel = compile_all(name, monkeypatch, compiled)[f"{choice.up.kernel}_up"]
        assert not re.search(r"convert_layout [^\n]*xf32", kernel.ttgir), name
        assert "xbf16" in kernel.ttgir or "xf16" in kernel.ttgir, "the text is not read as it is written"
        if choice.up.kernel == "tokens_m_ws":  # both halves are columns of one MMA
            assert f"m64n{2 * choice.up.cols}k16" in kernel.ptx, name
        seen.add(choice.up.kernel)
    assert seen == {"weights_m", "weights_m_ws", "tokens_m_ws"}
