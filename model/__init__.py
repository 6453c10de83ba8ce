"""Qwen3: layers, kernels, attention backends, sampler and weights. Imports nothing else of this project."""
