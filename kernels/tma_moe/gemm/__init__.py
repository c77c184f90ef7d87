"""The matrix products of the experts: one file for each way to compute them, named by one grammar.

Each way computes the two products of a SwiGLU network for all rows at once; a row is a (token, chosen expert) pair:

    up      h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])     from x [T, H] to h [T * K, I]
    down    rows[slot, n] = down[e, n] . h[row]                                 from h to rows [T * K, H]

A warpgroup MMA of Hopper takes 64 rows of its M operand at a time and from 8 to 256 columns of its N operand, so a
first name says which operand is M, and a suffix how the warps of a program share the work:

                          all warps do the same (Triton)       warps have roles (Gluon, `_ws`)
    weights are M         weights_m                            weights_m_ws
    tokens are M          -                                    tokens_m_ws

    no matrix unit        gemv

Rows per expert at which the shipped tiles use each way (128 experts, top-8; configs/):

    gemv            below 0.5
    weights_m       0.5 to 48; also the up product above 256 (H100), or from 128 to 256 (H200)
    weights_m_ws    48 to 256 (H100), 48 to 128 (H200)
    tokens_m_ws     down above 256 (H100) or 128 (H200); up above 256 (H200)

- **weights_m** is what others call swap AB. With few tokens the 64 rows have to be weights, of which there are plenty;
  the tokens, on the N side, are padded to 16 only.
- **_ws** is warp-specialised: one warp or warp group copies, two warp groups multiply, and they meet at a ring of
  buffers. Triton's own pipeline cannot let one consumer store its result while the other one multiplies.
- The fourth corner, tokens as M in plain Triton, was measured: it won only at 768 tokens, by 1 %, and was removed
  (docs/log.md).

For FP8 weights there are three more, `fp8_gemv`, `fp8_weights_m` and `fp8_tokens_m_ws`, the last of which does for all
loads from 8 rows an expert on (docs/fp8.md).

Each file holds its kernels, its views of the weights and the check of its tiles. The grid is shared (product.py). gemv
takes ids rather than a plan, so `recipe.GemvRecipe` builds its `Up` and `Down` directly.
"""
