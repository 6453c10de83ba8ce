"""From a checkpoint to a model that is ready to run: shapes first, then memory, then the slices this rank needs.

What a layer needs is the layer's knowledge (`Shard`); what lies on disk is `model/checkpoint.py`'s. This file matches
the two by name and moves the bytes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from zlib import crc32

import torch

from model.attention import make_attention
from model.checkpoint import CheckpointTensor, open_checkpoint
from model.config import Qwen3Config
from model.errors import ModelError
from model.layers import Part, Shard, ShardedModule
from model.parallel import TensorParallel
from model.qwen3 import Qwen3ForCausalLM

Progress = Callable[[int, int], None]
"""Called with (bytes_done, bytes_total) of this rank, from loader threads but never from two at once."""

_MAX_READERS = 8
"""Files read at the same time: enough to hide page faults and device copies behind each other."""


def empty_model(
    config: Qwen3Config,
    *,
    tp: TensorParallel,
    device: torch.device,
    dtype: torch.dtype,
    attention_backend: str = "auto",
    block_size: int,
    max_model_len: int,
) -> Qwen3ForCausalLM:
    """Build this rank's part of a model that is to run on `device`, as yet without memory for its weights (on meta).

    Args:
        dtype: of weights and activations.
        block_size: tokens of one KV block.
        max_model_len: longest sequence in tokens.

    Raises:
        ModelError: it cannot be split, or has no such attention.
    """
    config.check_parallel(tp.size)
    attention = make_attention(
        attention_backend,
        num_heads=config.num_attention_heads // tp.size,
        num_kv_heads=config.kv_heads_per_rank(tp.size),
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        block_size=block_size,
        device=device,
        dtype=dtype,
    )
    meta = torch.device("meta")
    return Qwen3ForCausalLM(config, attention, max_model_len=max_model_len, tp=tp, dtype=dtype, device=meta)


def load_model(
    model: Qwen3ForCausalLM,
    folder: str | Path,
    *,
    device: torch.device,
    load_format: Literal["auto", "random"] = "auto",
    progress: Progress | None = None,
) -> Qwen3ForCausalLM:
    """Give an empty model memory on the device that it was built for, and weights; return it in eval mode.

    Everything that can be wrong with the checkpoint is found before memory is taken on the device.

    Args:
        folder: where the safetensors files are, whose values are converted to the model's dtype; not looked at with
            `load_format="random"`.
        load_format: `random` makes weights of the right shapes instead of reading any.

    Raises:
        ModelError: the checkpoint does not fit the model, or does not fit on the device.
    """
    report = progress if progress is not None else _ignore_progress
    if load_format == "random":
        _materialize(model, device)
        load_random(model, seed=0, progress=report)
    else:
        checkpoint = open_checkpoint(Path(folder))
        check_checkpoint(model, checkpoint, folder)
        _materialize(model, device)
        load_weights(model, checkpoint, progress=report)
    for layer in model.modules():
        if isinstance(layer, ShardedModule):
            layer.finish()
    return model.eval()


def checkpoint_shards(model: Qwen3ForCausalLM) -> dict[str, Shard]:
    """Return what this rank needs of each checkpoint tensor, by the tensor's name. Tied weights appear once."""
    packed: dict[str, list[tuple[str, Part | None]]] = defaultdict(list)
    for name, (module, part) in model.packed_modules_mapping.items():
        packed[module].append((name, part))
    shards: dict[str, Shard] = {}
    for name, _ in model.named_parameters():
        path, _, parameter = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        layer = model.get_submodule(path)
        if not isinstance(layer, ShardedModule):
            raise TypeError(f"{path} ({type(layer).__name__}) holds parameters but cannot tell their slices")
        for source, part_of_it in packed.get(leaf, [(leaf, None)]):
            source_path = f"{parent}.{source}" if parent else source
            shards[f"{source_path}.{parameter}"] = layer.shard(parameter, part_of_it)
    return shards


def check_checkpoint(model: Qwen3ForCausalLM, checkpoint: Mapping[str, CheckpointTensor], folder: str | Path) -> None:
    """Compare names and shapes with what the model needs; the model may be on `meta`.

    Raises:
        ModelError: a tensor is missing, is not part of the model, or has another shape than config.json says.
    """
    shards = checkpoint_shards(model)
    if missing := sorted(shards.keys() - checkpoint.keys()):
        raise ModelError(
            f"{folder}: tensor {missing[0]} is missing{_and_more(missing)}, shape "
            f"{list(shards[missing[0]].full_shape)} expected; do config.json and the weights belong together?"
        )
    for name, shard in shards.items():
        tensor = checkpoint[name]
        if tensor.shape != shard.full_shape:
            raise ModelError(
                f"{tensor.file}: tensor {name} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(shard.full_shape)}; do they belong together?"
            )
    if extra := sorted(name for name in checkpoint.keys() - shards.keys() if not _is_redundant(name, model.config)):
        tensor = checkpoint[extra[0]]
        raise ModelError(
            f"{tensor.file}: tensor {extra[0]} of shape {list(tensor.shape)} is not part of the model that config.json "
            f"describes{_and_more(extra)}; do they belong together?"
        )


def load_weights(model: Qwen3ForCausalLM, checkpoint: Mapping[str, CheckpointTensor], *, progress: Progress) -> None:
    """Copy this rank's slices into a model that `check_checkpoint` has accepted, several files at once."""
    shards = checkpoint_shards(model)
    meter = _Meter(shards.values(), progress)
    by_file: dict[Path, list[tuple[CheckpointTensor, Shard]]] = defaultdict(list)
    for name, shard in shards.items():
        by_file[checkpoint[name].file].append((checkpoint[name], shard))

    def load_file(work: list[tuple[CheckpointTensor, Shard]]) -> None:
        for tensor, shard in work:
            shard.target.copy_(tensor.read(shard.source))
            meter.add(shard)

    with ThreadPoolExecutor(_MAX_READERS, thread_name_prefix="load") as readers:
        for _ in readers.map(load_file, by_file.values()):
            pass  # the iteration raises what a reader raised
    _wait_for_device(model)


def load_random(model: Qwen3ForCausalLM, seed: int, *, progress: Progress | None = None) -> None:
    """Fill the model with values of a sensible scale: matrices normal with variance 1 / fan-in, norms 1, biases 0.

    Each checkpoint tensor is drawn whole from a generator of its own, seeded by its name, and then cut, so that the
    weights are the same for every tensor-parallel size. They are not the same on different kinds of device.
    """
    shards = checkpoint_shards(model)
    meter = _Meter(shards.values(), progress or _ignore_progress)
    for name, shard in shards.items():
        if name.endswith("bias"):
            shard.target.zero_()
        elif len(shard.full_shape) == 1:
            shard.target.fill_(1.0)
        else:
            generator = torch.Generator(shard.target.device).manual_seed(crc32(name.encode(), seed))
            whole = torch.empty(shard.full_shape, dtype=shard.target.dtype, device=shard.target.device)
            whole.normal_(std=shard.full_shape[-1] ** -0.5, generator=generator)
            shard.target.copy_(whole[shard.source])
        meter.add(shard)
    _wait_for_device(model)


class _Meter:
    """Adds up the bytes of shards and reports them, whichever thread loaded them."""

    def __init__(self, shards: Iterable[Shard], progress: Progress) -> None:
        self._total = sum(shard.target.nbytes for shard in shards)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def add(self, shard: Shard) -> None:
        with self._lock:
            self._done += shard.target.nbytes
            self._progress(self._done, self._total)


def _materialize(model: Qwen3ForCausalLM, device: torch.device) -> None:
    needed = sum(parameter.nbytes for parameter in model.parameters())
    try:
        model.materialize(device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise ModelError(
            f"{device}: the weights of one rank need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB are free; use more ranks (--tensor-parallel-size) or a smaller model"
        ) from error


def _wait_for_device(model: Qwen3ForCausalLM) -> None:
    device = model.lm_head.weight.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _is_redundant(name: str, config: Qwen3Config) -> bool:
    """Whether a tensor may be in a checkpoint although the model has no place for it."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _ignore_progress(done: int, total: int) -> None:
    """For callers who do not watch."""
