"""The kernels at the tower's door against the plain torch they stand for: compiled on a GPU, else interpreted."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_moe.inputs.images import ImageSettings, copy_pixels, cut_patches
from qwen3vl_moe.ops.kernels import patches as kernels
from qwen3vl_moe.ops.reference import mix_positions
from tests.interpreted import DEVICE, DTYPES, runs_kernels


@runs_kernels
@pytest.mark.parametrize(("patch", "merge", "frames"), [(16, 2, 2), (14, 2, 1), (8, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES[:1]])
def test_patches_equal_those_of_the_host(patch, merge, frames, dtype):
    """Bit for bit: each step is rounded as there."""
    settings = ImageSettings(
        patch_size=patch,
        temporal_patch_size=frames,
        merge_size=merge,
        min_pixels=1,
        max_pixels=1 << 20,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    noise = np.random.default_rng(0).integers(0, 256, (3 * patch * merge, 2 * patch * merge, 3), dtype=np.uint8)
    picture = settings.resize(Image.fromarray(noise))
    pixels = copy_pixels([picture], "cpu")
    expected = cut_patches(pixels, [picture], dtype)
    ours = torch.full_like(expected, torch.nan).to(DEVICE)
    sides = patch, merge, frames
    kernels.cut_patches(pixels[0].to(DEVICE), ours, sides, settings.mean, settings.std)
    assert torch.equal(ours.cpu(), expected)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 1152])
def test_positions(dtype, width):
    table, x = torch.randn(9, width, device=DEVICE, dtype=dtype), torch.randn(7, width, device=DEVICE, dtype=dtype)
    index, weight = torch.randint(0, 9, (7, 4), device=DEVICE), torch.rand(7, 4, device=DEVICE)
    exact = x.double() + mix_positions(table.double(), index, weight.double())
    plain = x + mix_positions(table.float(), index, weight).to(dtype)
    error, allowed = (kernels.add_positions(x, table, index, weight).double() - exact).abs(), (plain - exact).abs()
    # Contraction may turn a rounding the other way.
    assert error.max() <= allowed.max() + torch.finfo(dtype).eps * exact.abs().max()
