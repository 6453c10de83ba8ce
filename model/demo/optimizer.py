"""Muon for the matrices of the layers, Adam for the embedding and the norms.

Muon (Jordan et al., 2024) makes each update of a matrix orthogonal by Newton-Schulz iterations on its momentum; its
scale is matched to Adam's (Liu et al., 2025, "Muon is scalable for LLM training"), so that both share a learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from model.demo.network import EMBEDDING

MOMENTUM = 0.95
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
EPSILON = 1e-8
ADAM_RATE = 0.7
"""Adam's learning rate is this part of Muon's."""

_NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


class Optimizer:
    """Updates weights in place from their gradients. `state` holds everything that a resumed training needs.

    Gradients stay where they are, as zeros after each step, and nothing here asks the device for a number: a CUDA graph
    can record a step and do it again.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        device = next(iter(weights.values())).device
        self._weights = weights
        for tensor in weights.values():
            tensor.grad = torch.zeros_like(tensor)
        self.rate = torch.zeros((), device=device)
        """Muon's learning rate."""
        matrices = [name for name, tensor in weights.items() if tensor.dim() == 2 and name != EMBEDDING]
        self._groups: dict[str, list[str]] = {}  # matrices of one size are updated together
        for name in matrices:
            size = "x".join(map(str, weights[name].shape))
            self._groups.setdefault(size, []).append(name)
        self._others = [name for name in weights if name not in set(matrices)]
        self.state: dict[str, torch.Tensor] = {"steps": torch.zeros((), dtype=torch.int64, device=device)}
        for size, names in self._groups.items():
            self.state[f"momentum.{size}"] = torch.stack([torch.zeros_like(weights[name]) for name in names])
        for name in self._others:
            self.state[f"mean.{name}"] = torch.zeros_like(weights[name])
            self.state[f"square.{name}"] = torch.zeros_like(weights[name])

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in self.state.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def step(self) -> None:
        """Update every weight by its gradient, at `rate`, and forget the gradients."""
        self.state["steps"] += 1
        for size, names in self._groups.items():
            self._muon(names, self.state[f"momentum.{size}"])
        for name in self._others:
            self._adam(name)
        for tensor in self._weights.values():
            _gradient(tensor).zero_()

    def _muon(self, names: list[str], momentum: torch.Tensor) -> None:
        gradients = torch.stack([_gradient(self._weights[name]) for name in names])
        momentum.lerp_(gradients, 1 - MOMENTUM)
        update = orthogonal(gradients.lerp(momentum, MOMENTUM))
        update = update * (0.2 * max(update.shape[-2:]) ** 0.5 * self.rate)
        for name, change in zip(names, update, strict=True):
            self._weights[name].mul_(1 - self.rate * WEIGHT_DECAY).sub_(change)

    def _adam(self, name: str) -> None:
        weight, steps = self._weights[name], self.state["steps"]
        gradient = _gradient(weight)
        mean, square = self.state[f"mean.{name}"], self.state[f"square.{name}"]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square(), 1 - BETAS[1])
        root = (square / (1 - BETAS[1] ** steps)).sqrt_().add_(EPSILON)
        weight.sub_(mean / root * (self.rate * ADAM_RATE / (1 - BETAS[0] ** steps)))


def _gradient(weight: torch.Tensor) -> torch.Tensor:
    if weight.grad is None:
        raise ValueError("a weight has no gradient: run backward first")
    return weight.grad


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with singular values near 1, by Newton-Schulz. [n, rows, columns], fp32 -> the same."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in _NEWTON_SCHULZ:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()
