"""A step's tensors on their way to the device: all in one buffer."""

from dataclasses import fields

import pytest
import torch

from qwen3vl_moe.model.batch import Batch
from qwen3vl_moe.ops import Segments
from qwen3vl_moe.ops.transfer import _fill, _sections, all_to_device

TENSORS = (
    torch.arange(7),
    torch.arange(5, dtype=torch.int32),
    torch.empty(0, dtype=torch.int64),
    torch.rand(3, 4),
    torch.tensor([[True], [False], [True]]),
    torch.rand(2, 1, 3, dtype=torch.float64).transpose(0, 2),
)


def test_sections_of_a_buffer_hold_their_tensors_apart():
    ends = [64, 96, 96, 144, 160, 208]  # each begins at a multiple of 16 bytes, and has room
    buffer = torch.zeros(ends[-1], dtype=torch.uint8)
    sections = _sections(buffer, TENSORS, ends)
    for x, section in zip(TENSORS, sections, strict=True):
        _fill(section, x)
    for x, section in zip(TENSORS, sections, strict=True):
        assert torch.equal(x, section)
        assert section.is_contiguous()
        assert (section.data_ptr() - buffer.data_ptr()) % 16 == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_many_bytes_are_copied_whole(dtype):
    whole = torch.randint(0, 99, (400, 300)).to(dtype)
    for x in (whole, whole.T, whole[:, 7:], whole[:1].expand(400, -1)):
        section = torch.zeros(x.nbytes, dtype=torch.uint8).view(dtype).view(x.shape)
        _fill(section, x)
        assert torch.equal(section, x)


def batch(**more) -> Batch:
    return Batch(
        input_ids_T=torch.arange(6),
        positions_3T=torch.arange(6).expand(3, -1),
        segments=Segments.build(
            [2, 4], [2, 9], block_tables=torch.arange(4, dtype=torch.int32).view(2, 2), block_size=16
        ),
        slots_T=torch.arange(6) + 40,
        logit_rows=torch.tensor([1, 5]),
        **more,
    )


def assert_same(ours: Batch, expected: Batch, device: str) -> None:
    for field in fields(Batch):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.device.type == device
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b.cpu()), field.name
        elif field.name != "segments":
            assert a == b
    for name in ("q_starts", "kv_starts", "block_tables"):
        assert torch.equal(getattr(ours.segments, name).cpu(), getattr(expected.segments, name))
        assert getattr(ours.segments, name).device.type == device
    assert (ours.segments.q_lens, ours.segments.kv_lens) == (expected.segments.q_lens, expected.segments.kv_lens)


def test_to_the_cpu_changes_nothing():
    assert_same(batch().to("cpu"), batch(), "cpu")


@pytest.mark.gpu
def test_to_a_gpu_in_one_copy():
    from torch.profiler import ProfilerActivity, profile

    for x, there in zip(TENSORS, all_to_device(TENSORS, "cuda"), strict=True):
        assert torch.equal(x, there.cpu())
    step = batch(padding_T=torch.zeros(6, dtype=torch.bool, device="cuda"))  # one tensor that is there already
    step.to("cuda")
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        moved = step.to("cuda")
        torch.cuda.synchronize()
    assert sum("HtoD" in event.name for event in trace.events()) == 1
    assert_same(moved, step, "cuda")
