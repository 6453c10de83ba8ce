"""Random checkpoints, and what a scheduler would do: blocks for sequences, and `StepInputs` for a step."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch

from model.config import Qwen3Config
from model.inputs import StepInputs
from model.kernels import linear
from model.kernels.runtime import triton
from model.kernels.small_linear import Tiling
from model.kernels.tilings import tiling_for
from model.parallel import TensorParallel
from model.qwen3 import Qwen3ForCausalLM
from model.weights import Progress, empty_model, load_model

CPU = torch.device("cpu")

TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
}


def save_checkpoint(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Any:
    """Save a random Qwen3 as transformers does and return transformers' model of it, in float32.

    Every tensor is random, norms and biases too, so that none can be forgotten or mixed up unseen.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.Qwen3Config(**{**TINY, **overrides})
    model = transformers.Qwen3ForCausalLM(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1 + 0.2 * noise)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def load(
    folder: Path,
    *,
    tp: TensorParallel | None = None,
    block_size: int = 8,
    load_format: Literal["auto", "random"] = "auto",
    progress: Progress | None = None,
    **options: Any,
) -> Qwen3ForCausalLM:
    """Load a checkpoint with our code, on the CPU in float32 unless `options` of `empty_model` say otherwise."""
    config = Qwen3Config.from_folder(folder)
    options = {"device": CPU, "dtype": torch.float32, "max_model_len": config.max_context} | options
    model = empty_model(config, tp=tp or TensorParallel.single(), block_size=block_size, **options)
    return load_model(model, folder, device=options["device"], load_format=load_format, progress=progress)


def unpack(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Give the model back its weights as the checkpoint's tensors filled them."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_mkldnn:
                setattr(module, name, torch.nn.Parameter(parameter.to_dense(), requires_grad=False))
    return model


@contextmanager
def fused_launches() -> Iterator[None]:
    """Let linear layers of one or two rows be one launch with what stands around them, in Triton's interpreter.

    Tiles are as large as they may be there: it takes its time for each program. (More rows are for Gluon.)
    """

    def tiling(rows: int, n: int, k: int, *, gated: bool, adds: bool, push: bool, clusters: bool) -> Tiling | None:
        chosen = tiling_for(rows, n, k, gated=gated, adds=adds, push=push, clusters=clusters)
        return replace(chosen, block_n=64) if chosen is not None and chosen.form == "fma" else None

    with patch.object(linear, "_wants_small_linear", lambda x: True), patch.object(linear, "tiling_for", tiling):
        yield


def interpreted() -> bool:
    """Tell whether Triton's kernels run in its interpreter here, on the CPU."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def random_ids(count: int, vocab_size: int = TINY["vocab_size"], seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=count)


@dataclass
class PagedSequence:
    """A sequence whose keys and values are in the cache up to `length`."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


class PagedCache:
    """A KV cache full of nan, as if left by a failed owner, with blocks handed out in random order."""

    def __init__(
        self, config: Qwen3Config, *, num_blocks: int = 64, block_size: int = 8, tp_size: int = 1, seed: int = 0
    ) -> None:
        self.block_size = block_size
        kv_heads = config.kv_heads_per_rank(tp_size)
        shape = (config.num_hidden_layers, 2, num_blocks, block_size, kv_heads, config.head_dim)
        self.tensor = torch.full(shape, float("nan"))
        self._free = random.Random(seed).sample(range(num_blocks), num_blocks)

    def step(self, rows: Sequence[tuple[PagedSequence | None, Sequence[int]]]) -> StepInputs:
        """Append new token ids to sequences and describe the step that computes them.

        Rows of one token must come first: those before the first longer row are decode rows. None is a dead row.
        """
        num_decode_rows = next((i for i, (_, ids) in enumerate(rows) if len(ids) != 1), len(rows))
        positions, slots, kv_lens, tables = [], [], [], []
        for sequence, ids in rows:
            if sequence is None:
                positions += [0] * len(ids)
                slots += [-1] * len(ids)
                kv_lens.append(0)
                tables.append([])
                continue
            new_positions = range(sequence.length, sequence.length + len(ids))
            sequence.length += len(ids)
            while len(sequence.blocks) * self.block_size < sequence.length:
                sequence.blocks.append(self._free.pop())
            positions += new_positions
            slots += [
                sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in new_positions
            ]
            kv_lens.append(sequence.length)
            tables.append(sequence.blocks)
        lengths = [len(ids) for _, ids in rows]
        width = max(map(len, tables)) + 2
        garbage = 2**31 - 1
        return StepInputs(
            token_ids=_int32(token for _, ids in rows for token in ids),
            positions=_int32(positions),
            kv_slots=torch.tensor(slots, dtype=torch.int64),
            query_starts=_int32([0, *torch.tensor(lengths).cumsum(0).tolist()]),
            kv_lens=_int32(kv_lens),
            block_tables=torch.tensor([[*t, *[garbage] * (width - len(t))] for t in tables], dtype=torch.int32),
            num_decode_rows=num_decode_rows,
            max_single_rows=lengths.count(1),
            max_chunk_rows=len(rows) - num_decode_rows,
            max_query_len=max([1, *lengths[num_decode_rows:]]),
            max_kv_len=max(kv_lens),
        )


def run(model: Qwen3ForCausalLM, cache: PagedCache, rows: Sequence[tuple[PagedSequence | None, Sequence[int]]]) -> Any:
    """Run one step and return the logits of each row's tokens: a list of [row's tokens, vocab]."""
    with torch.inference_mode():
        logits = model.compute_logits(model(cache.step(rows), cache.tensor))
    return logits.split([len(ids) for _, ids in rows])


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
