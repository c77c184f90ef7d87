"""What kernels in Gluon share: a ring's barriers, a kernel's turn, names that triton 3.9 changed, small arithmetic.

Gluon is the layer of Triton where a kernel says itself which warps do what, where buffers lie and who waits for whom.
It is part of triton, has no interpreter, and is still called experimental.

A warp-specialised kernel here has one producer, which copies, and two consumers of four warps each, which multiply and
store. They meet at a ring of STAGES buffers. Each buffer has two barriers; a barrier's phase flips whenever it has seen
as many arrivals as it was made for:

        producer, step i                              either consumer, step i
        ----------------                              -----------------------
        s = i % STAGES                                s = i % STAGES
        wait empty[s]    <------ two arrivals -----.  wait full[s]    <-------- FULL_COUNT arrivals -----.
        announce the bytes of TMA to full[s]       |  start the MMAs that read buffer s                  |
        start the copies into buffer s             |  wait until those of step i - 1 have ended          |
        (the copies arrive at full[s] when done)   '- arrive at empty[(i - 1) % STAGES]                  |
          '----------------------------------------------------------------------------------------------'

Words that are used below and in the kernels:

- `gl.warp_specialize([(f, args), ...], warps, registers)`: the first function runs in the launch's own warps and gets
  the registers that are left over; the two lists are for the other functions.
- `mbarrier.expect(b, n)` is itself one arrival, and holds the phase until n bytes of TMA have landed. That is why
  FULL_COUNT is 1 where TMA alone fills a buffer.
- `gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])` is a wgmma accumulator: 4 warps of 16 rows each, N columns.
- `gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])`: 8 values (16 bytes) per thread, 4 x 8 threads per warp, and
  4 warps one above the other.
- `.permute((1, 0))` of a buffer is a transposed view; nothing moves.

The step that a barrier is in is not stored anywhere: i // STAGES is odd or even, and that is the phase to wait for. On
the first round the producer waits for the opposite phase, so that it finds every buffer empty.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from tma_moe.routing import HEADER

# triton 3.9 renamed both copies.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
gather_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

PLAN_HEADER = gl.constexpr(HEADER.value)
CONSUMERS = gl.constexpr(2)  # warp groups that multiply
AHEAD = gl.constexpr(512)  # values of each row of weights that are prefetched: more was 2 to 4 us slower


@gluon.jit
def take_turn():
    """Waits for the kernel before, then lets the next one start: `pdl.take_turn`, which Gluon cannot call."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def prefetch_rows(weights_ptr, first_row, N: gl.constexpr, K: gl.constexpr):
    """Asks L2 for the first AHEAD values of N rows [K] of weights, while the kernel before still runs."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32 // (AHEAD // 64), AHEAD // 64], [4, 1], [1, 0])
    rows = first_row + gl.arange(0, N, gl.SliceLayout(1, layout))
    first = gl.minimum(gl.arange(0, AHEAD // 64, gl.SliceLayout(0, layout)) * 64, K - 1)  # a line of L2 is 64 values
    at = weights_ptr + (rows.to(gl.int64) * K)[:, None] + first[None, :]
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def make_barriers(STAGES: gl.constexpr, FULL_COUNT: gl.constexpr):
    """Two barriers per buffer of a ring, (full, empty): filled by FULL_COUNT arrivals, emptied by both consumers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FULL_COUNT)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    # Make the initialised barriers visible to TMA before it uses them.
    fence_async_shared()
    return full, empty


@gluon.jit
def silu_times(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def halves(x):
    """Left and right half of the columns, or of a vector; both stay in the registers that they are in."""
    if len(x.shape) == 1:
        return x.reshape([2, x.shape[0] // 2]).permute((1, 0)).split()
    else:
        return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()
