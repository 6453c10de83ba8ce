"""What the kernel tests share: the error they measure, and inputs that show a wrong index."""

from __future__ import annotations

import torch

from model.kernels.attention import SPLITTING, Splitting

ON_GPU = torch.cuda.is_available()
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability()[0] == 9
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if ON_GPU else 2e-2}
"""Relative error against the exact result that a kernel may show, by the dtype of its inputs and outputs."""
HOW_SPLIT = SPLITTING if ON_GPU else Splitting(programs=32, max_units=32)
"""How decode attention splits rows. A launch has as many programs as there may be units: on a CPU those take long."""
SPLIT_FAR = Splitting(programs=40, min_keys=64, turn_keys=0, merge_keys=0, max_units=40)
"""In tiles, while there are programs for them."""
MATCH = {torch.float32: 1e-6, torch.bfloat16: 1e-3 if ON_GPU else 2e-2}
"""Relative error against a reference that rounds in the same places. Triton's interpreter truncates to bfloat16."""


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖out - expected‖ / ‖expected‖ in float64; NaN where `out` holds one, which no bound admits."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a tensor of NaN, in which an element that nothing wrote, or that should not have been read, shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)
