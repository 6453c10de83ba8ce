"""Programmatic dependent launch (PDL): a kernel that starts while the one before it still runs.

What a kernel can do without the results of others (start, compute addresses, fetch weights) then costs no time of its
own. A kernel that is launched so keeps three rules, and kernels that are not may stand anywhere between:

- Before `wait` a program reads only what no kernel of the forward pass writes: weights, tables, the step's inputs, and
  places of the KV cache that earlier steps wrote.
  Everything else is read, and anything at all is written, after it. (The pass begins with two ordinary launches,
  attention's lists and the embedding, and the first lets nothing start early: so whatever was launched before them has
  ended for all that come behind, and the lists too. Kernels in front of them, those of the tables, read nothing
  before it.)
- Every program calls `wait`, also one without work. A kernel then ends after all kernels before it have ended, so that
  waiting for the last one is waiting for all.
- `begin_dependents` promises nothing about memory, since whoever comes next waits for the end of this kernel and not
  for this call. It comes first, but where a kernel waits for few bytes again and again, in whose way would be what the
  next one fetches: sums over ranks call it behind `wait`, layers that sum not at all, which is when they end, and
  attention in Gluon when it has its first queries.

Whether a kernel waits for its inputs is tested with some that come late: test_dependent.py, which misses none.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton gives annotations a meaning of its own, so that pointers in kernels have comments instead.)

from __future__ import annotations

import torch

from model.kernels.runtime import is_hopper, jit, tl, wanted


def dependent_launch(x: torch.Tensor) -> dict[str, bool]:
    """Return the launch options of a kernel on the device of `x`: it gets the constant PDL where there are any."""
    return {"launch_pdl": True} if wanted("pdl") and is_hopper(x.device) else {}


@jit
def begin_dependents(PDL: tl.constexpr):
    """Let the next kernel start, if it is a dependent one."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait(PDL: tl.constexpr):
    """Wait until every kernel before this one has ended and what it wrote can be read."""
    if PDL:
        tl.extra.cuda.gdc_wait()
