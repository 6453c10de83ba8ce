"""The model's Triton kernels, each beside a plain torch reference of the same signature.

Every module here holds, for an operation `foo`: the kernel, its launcher `foo_triton`, the reference `foo_torch` that
defines what the kernel must compute, and `foo`, which picks one by where its input lies. `runtime.py` is the only place
that imports Triton, `dependent.py` tells how kernels overlap, and `linear.py`, with `tilings.py`, which kernels compute
a linear layer.

`ring_linear.py` and `prefill_attention.py` are other kernels for two of these operations, in Gluon, for Hopper;
`tiles.py` is what they share. No interpreter runs them: without a GPU, tests only compile them.
"""
