"""The Triton and Gluon kernels of :mod:`qwen3vl_moe.ops`. Importing one needs triton, which a CPU may lack."""
