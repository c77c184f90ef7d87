"""The matrix products for every CUDA card from compute capability 8.0 on, in plain Triton.

`backend="triton"`. What gemm/ does with TMA, warpgroup MMA and Gluon is done here with ordinary loads of pointers and
`tl.dot`, of which Triton makes each card's own copies and matrix instructions:

    capability   cards                       matrix instruction     a program may have     dependent launches (pdl.py)
    8.0          A100                        mma.sync               163 KB shared memory   no
    8.6          RTX 3090, A40, RTX A6000    mma.sync               99 KB                  no
    8.9          L40S, RTX 4090              mma.sync, FP8          99 KB                  no
    9.0          H100, H200                  wgmma, FP8             227 KB                 yes
    10.0         B200                        tcgen05, FP8           227 KB                 yes
    12.0         RTX 5090, RTX PRO 6000      mma.sync, FP8          99 KB                  yes

    products.py        the up and the down product, for weights of 16 bits
    fp8_products.py    the same for FP8 weights
    widen.py           FP8 values by integer arithmetic, for cards that have none
    targets.py         what of a card decides about tiles

Routing, grouping and the sum over experts are those of gemm/, and so is the decode of a few tokens (gemm/gemv.py,
gemm/fp8_gemv.py): none of them ever needed more than ordinary loads.

**Which operand is M.** With few rows per expert the weights are (`weights_m` of the tiles): a matrix instruction takes
at least 16, 64 or 128 rows of M, and of weights there are plenty. With many rows the tokens are, whose tile then meets
two or four times as many weight rows in one instruction.

**FP8.** Where the tensor cores multiply FP8 (from 8.9 on), activations are quantised and the arithmetic is that of
block_fp8.py. Where they do not, FP8 values become 16-bit ones on the way into the tensor core, exactly; activations
stay as they are, and each step's sum is multiplied by its block's scale in float32. That is more accurate than the
format asks for, and reads as few bytes.
"""
