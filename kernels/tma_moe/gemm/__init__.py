"""The matrix products of the experts: one file for each way to compute them, named by one grammar.

Each way computes the two products of a SwiGLU network for all rows at once; a row is a (token, chosen expert) pair:

    up      h[row, n] = silu(gate[e, n] . x[token]) * (up[e, n] . x[token])     from x [T, H] to h [T * K, I]
    down    rows[slot, n] = down[e, n] . h[row]                                 from h to rows [T * K, H]

A warpgroup MMA of Hopper takes 64 rows of its M operand at a time and from 8 to 256 columns of its N operand, so a
first name says which operand is M, and a suffix how the warps of a program share the work:

                          all warps do the same (Triton)       warps have roles (Gluon, `_ws`)
    weights are M         weights_m     up to about 100        weights_m_ws   about 30 to 300
                                        rows an expert                        rows an expert
    tokens are M          -                                    tokens_m_ws    from 256 rows an expert

    no matrix unit        gemv          up to a token an expert

- **weights_m** is what others call swap AB. With few tokens the 64 rows have to be weights, of which there are plenty;
  the tokens, on the N side, are padded to 16 only.
- **_ws** is warp-specialised: one warp or warp group copies, two warp groups multiply, and they meet at a ring of
  buffers. Triton's own pipeline cannot let one consumer store its result while the other one multiplies.
- The fourth corner, tokens as M in plain Triton, was measured and won nowhere; docs/log.md has its figures.

Every file owns all that is particular to its way: the kernels, how it views the weights, its blocks, its grid, and
which tiles it takes (`Up` and `Down`, made by `product`). `tma_moe.recipe` puts them together.
"""
