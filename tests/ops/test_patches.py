"""The kernels at the tower's door against the plain torch they stand for: compiled on a GPU, else interpreted."""

import numpy as np
import pytest
import torch
from PIL import Image

from qwen3vl_moe.inputs.images import ImageSettings, copy_pixels, cut_patches
from qwen3vl_moe.ops import reference
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
def test_frames_of_a_video():
    """Each frame of a piece of a video goes to its place in the patches; beside it, a still picture fills them all."""
    sides, mean, std = (4, 2, 2), (0.5, 0.25, 0.125), (0.5, 1.0, 2.0)
    clip = torch.randint(0, 256, (2, 3, 8, 16), dtype=torch.uint8)
    expected = reference.cut_patches([clip, clip[0]], sides, mean, std, torch.float32)
    still = [reference.cut_patches([frame], sides, mean, std, torch.float32).view(-1, 3, 2, 16) for frame in clip]
    assert torch.equal(expected[:8].view(-1, 3, 2, 16), torch.stack([still[0][:, :, 0], still[1][:, :, 1]], dim=2))
    assert torch.equal(expected[8:].view(-1, 3, 2, 16), still[0])
    ours = torch.full_like(expected[:8], torch.nan).to(DEVICE)
    kernels.cut_patches(clip.to(DEVICE), ours, sides, mean, std)
    assert torch.equal(ours.cpu(), expected[:8])


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
