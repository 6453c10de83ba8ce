"""One update of the weights: the gradients of some micro-batches, then the optimizer's step.

`Update` does one operation after the other. `RecordedUpdate` records all of it as CUDA graphs, one for each length of
rows: a model so small is otherwise bound by the host, which launches thousands of kernels of a few microseconds each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from model.demo.data import MicroBatch
from model.demo.network import Pieces, Shape, loss_sum
from model.demo.optimizer import Optimizer

STEPS_AHEAD = 2
"""Steps that the host may be ahead of the device, so that the learning rate is that of the time when it is used."""


class Update:
    """Adds up the gradients of micro-batches, and then updates the weights."""

    def __init__(
        self, weights: dict[str, torch.Tensor], optimizer: Optimizer, shape: Shape, pieces: Pieces, dtype: torch.dtype
    ) -> None:
        self.weights = weights
        self.optimizer = optimizer
        self.loss = torch.zeros((), device=next(iter(weights.values())).device)
        """Of the micro-batches since the last `begin`."""
        self._shape = shape
        self._pieces = pieces
        self._dtype = dtype

    def begin(self) -> None:
        self.loss.zero_()

    def add(self, batch: MicroBatch, total: float) -> None:
        """Add the gradient of the batch's loss, its tokens' weights being parts of `total`."""
        ids, targets, token_weights = (torch.from_numpy(array).to(self.loss.device) for array in _arrays(batch, total))
        self._add(ids, targets, token_weights, batch.length)

    def finish(self, rate: float) -> None:
        """Update the weights."""
        self.optimizer.rate.fill_(rate)
        self.optimizer.step()

    def _add(self, ids: torch.Tensor, targets: torch.Tensor, token_weights: torch.Tensor, length: int) -> None:
        tensors = list(self.weights.values())
        loss = loss_sum(self.weights, self._shape, self._pieces, ids, targets, token_weights, length, self._dtype)
        # Not `backward`: it would leave it to autograd on which stream the gradients are added up.
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
            assert tensor.grad is not None, "the optimizer keeps a gradient for each weight"
            tensor.grad.add_(gradient)
        self.loss.add_(loss.detach())


class RecordedUpdate(Update):
    """The same on a CUDA device, recorded once and replayed.

    Args:
        tokens: of every micro-batch, a multiple of each length.
        lengths: those that rows can have.

    Raises:
        ValueError: it is not.
    """

    def __init__(
        self,
        weights: dict[str, torch.Tensor],
        optimizer: Optimizer,
        shape: Shape,
        pieces: Pieces,
        dtype: torch.dtype,
        tokens: int,
        lengths: Sequence[int],
    ) -> None:
        super().__init__(weights, optimizer, shape, pieces, dtype)
        if any(tokens % length for length in lengths):
            raise ValueError(f"micro-batches of {tokens} tokens cannot be full of rows of each of {tuple(lengths)}")
        ids, targets = torch.zeros((2, tokens), dtype=torch.int64, device=self.loss.device)
        self._inputs = (ids, targets, torch.zeros(tokens, device=self.loss.device))
        self._pool = torch.cuda.graph_pool_handle()
        # With weights of 0 a trial changes no gradient. A trial of the optimizer's step needs weights of its own.
        self._passes = {length: self._record(partial(self._add, *self._inputs, length)) for length in lengths}
        self._step = self._record(optimizer.step, trial=_copy(optimizer, weights).step)
        self._ends: deque[torch.cuda.Event] = deque()

    def add(self, batch: MicroBatch, total: float) -> None:
        for tensor, array in zip(self._inputs, _arrays(batch, total), strict=True):
            tensor.copy_(torch.from_numpy(array).pin_memory(), non_blocking=True)
        self._passes[batch.length].replay()

    def finish(self, rate: float) -> None:
        self.optimizer.rate.fill_(rate)
        self._step.replay()
        self._ends.append(torch.cuda.Event())
        self._ends[-1].record()
        if len(self._ends) > STEPS_AHEAD:
            self._ends.popleft().synchronize()

    def _record(self, work: Callable[[], None], trial: Callable[[], None] | None = None) -> torch.cuda.CUDAGraph:
        """Record what `work` does. Before that it runs once, or `trial` does: what has to be compiled is compiled."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (trial or work)()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        return graph


def _arrays(batch: MicroBatch, total: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return batch.ids, batch.targets, batch.weights / np.float32(total)


def _copy(optimizer: Optimizer, weights: dict[str, torch.Tensor]) -> Optimizer:
    """An optimizer like this one, of copies of its weights, without gradients."""
    return type(optimizer)({name: tensor.detach().clone() for name, tensor in weights.items()})
