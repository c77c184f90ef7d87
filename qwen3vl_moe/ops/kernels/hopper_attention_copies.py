"""How :mod:`qwen3vl_moe.ops.kernels.hopper_attention` brings queries, keys and values into shared memory, by TMA.

Packed rows come 128 at a time. Keys in the cache lie in blocks that a table names, so they come in pages of 16 rows, of
which a block holds one or more. A buffer of [128, 128] with swizzled rows of 128 bytes is two halves of 64 channels,
one after the other, and in a half 16 rows are 2 KB that follow each other. So a page is two copies, each into a place
that is a whole buffer by itself: the ring is seen once as what the products read, and once as these places.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from qwen3vl_moe.ops.kernels.hopper_attention_tile import KEYS
from tma_moe.gluon_parts import tma_load

PAGE = gl.constexpr(16)  # rows
HALF = gl.constexpr(64)  # channels: 128 bytes, the width of the swizzle
PAGES = gl.constexpr(KEYS.value // PAGE.value)  # in a block of keys
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # by triton 3.9


@gluon.jit
def rings(descs, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """Shared memory for STAGES blocks of each part, in the swizzled layout in which TMA writes and wgmma reads."""
    # @gluon.jit supports no starred unpacking.
    shape_1: gl.constexpr = [STAGES] + descs[0].block_type.shape  # noqa: RUF005
    first = gl.allocate_shared_memory(descs[0].dtype, shape_1, descs[0].layout)
    if PARTS == 1:
        return (first,)
    else:
        shape_2: gl.constexpr = [STAGES] + descs[1].block_type.shape  # noqa: RUF005
        second = gl.allocate_shared_memory(descs[1].dtype, shape_2, descs[1].layout)
        return first, second


@gluon.jit
def load_rows(descs, row, head, barrier, buffers, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Copy 128 rows of one head, from `row` on, into the one or two buffers of its parts; `barrier` hears of it.

    Rows may run past the sequence into the next one's, and are masked later; past the tensor TMA writes zeros.
    """
    if PARTS == 1:
        mbarrier.expect(barrier, descs[0].block_type.nbytes)
        tma_load(descs[0], [row, head, 0], barrier, buffers[0])
    else:
        mbarrier.expect(barrier, descs[0].block_type.nbytes + descs[1].block_type.nbytes)
        tma_load(descs[0], [row, head, 0], barrier, buffers[0])
        tma_load(descs[1], [row, head, WIDTH], barrier, buffers[1])


@gluon.jit
def page_ring(desc, STAGES: gl.constexpr):
    """Shared memory for STAGES blocks of keys or values [KEYS, 1, 128] that come in pages."""
    ring = gl.allocate_shared_memory(desc.dtype, [STAGES, KEYS, 1, 2 * HALF], desc.layout)
    return (ring,)


@gluon.jit
def page_rows(table_at, first, kv_len, BLOCK_SIZE: gl.constexpr):
    """Rows of the cache at which the pages of a block of keys begin, from key `first` of a sequence on.

    Past the sequence's last page they are that page's: what is copied there is masked later.
    """
    rows = (_page_row(table_at, first, kv_len, BLOCK_SIZE),)
    for page in gl.static_range(1, PAGES):
        rows = rows + (_page_row(table_at, first + page * PAGE, kv_len, BLOCK_SIZE),)  # noqa: RUF005
    return rows


@gluon.jit
def _page_row(table_at, key, kv_len, BLOCK_SIZE: gl.constexpr):
    key = gl.minimum(key, kv_len - 1) // PAGE * PAGE
    return gl.load(table_at + key // BLOCK_SIZE) * BLOCK_SIZE + key % BLOCK_SIZE


@gluon.jit
def load_pages(desc, rows, head, barrier, ring, stage):
    """Copy the pages that begin at these rows, of one head, into a stage of a ring; `barrier` hears of it."""
    STAGES: gl.constexpr = ring.shape[0]
    places_shape: gl.constexpr = [STAGES * 2 * PAGES, PAGE, 1, HALF]
    if RENAMED:
        places = ring.reinterpret(ring.dtype, places_shape, ring.layout)
    else:
        places = ring._reinterpret(ring.dtype, places_shape, ring.layout)
    mbarrier.expect(barrier, 2 * PAGES * desc.block_type.nbytes)
    for page in gl.static_range(PAGES):
        for half in gl.static_range(2):
            place = places.index((stage * 2 + half) * PAGES + page)
            tma_load(desc, [rows[page], head, half * HALF], barrier, place)
