"""FP8 values (float8_e4m3fn) as 16-bit ones, by integer arithmetic: for cards whose instructions know no such format.

A byte is sign, four bits of exponent (bias 7), three of mantissa. Put under the exponent of a wider format, the same
bits stand for the value divided by a power of two, subnormal ones included, so one exact product finishes the job:

    float16 (bias 15)     s 0eeee mmm 0000000     value / 2^8
    bfloat16 (bias 127)   s 0000eeee mmm 0000     value / 2^120

NaN, which weights must not hold, is read as 480 (or -480): the patterns 0x7f and 0xff go the way of all others.
"""

import triton
import triton.language as tl

from tma_moe.support import interpreting

INTERPRETING = tl.constexpr(interpreting())

# Four bytes at a time, which are one register: prmt puts two of them into the upper halves of two 16-bit numbers.
TO_FP16 = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, 0, $2, 0x5140;
    prmt.b32 b, 0, $2, 0x7362;
    and.b32 c, a, 0x80008000;
    and.b32 d, b, 0x80008000;
    and.b32 a, a, 0x7f007f00;
    and.b32 b, b, 0x7f007f00;
    shr.b32 a, a, 1;
    shr.b32 b, b, 1;
    or.b32 a, a, c;
    or.b32 b, b, d;
    mov.b32 c, 0x5c005c00;
    mul.f16x2 $0, a, c;
    mul.f16x2 $1, b, c;
}""")
TO_BF16 = tl.constexpr("""{
    .reg .b32 a, b, c, d;
    prmt.b32 a, 0, $2, 0x5140;
    prmt.b32 b, 0, $2, 0x7362;
    and.b32 c, a, 0x80008000;
    and.b32 d, b, 0x80008000;
    and.b32 a, a, 0x7f007f00;
    and.b32 b, b, 0x7f007f00;
    shr.b32 a, a, 4;
    shr.b32 b, b, 4;
    or.b32 a, a, c;
    or.b32 b, b, d;
    mov.b32 c, 0x7b807b80;
    mov.b32 d, 0x80008000;
    fma.rn.bf16x2 $0, a, c, d;
    fma.rn.bf16x2 $1, b, c, d;
}""")


@triton.jit
def widened(bits, dtype: tl.constexpr):
    """The values of FP8 bytes (uint8) in float16, bfloat16 or float32, exactly."""
    if dtype == tl.float32 or INTERPRETING:
        wide = (bits & 0x80).to(tl.uint32) << 24 | (bits & 0x7F).to(tl.uint32) << 20
        return (wide.to(tl.float32, bitcast=True) * 2.0**120).to(dtype)
    elif dtype == tl.float16:
        return tl.inline_asm_elementwise(TO_FP16, "=r,=r,r", [bits], dtype=tl.float16, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(TO_BF16, "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4)
