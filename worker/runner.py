"""Runs planned steps on one rank's device: tables -> model -> sampler -> tables, as a CUDA graph where it can be one.

`launch` starts a step and returns; `collect` waits for the oldest one and gives its tokens. On a GPU the two are apart
by the run-ahead depth; on the CPU `launch` does the work. Leader and followers run the same code on the same plans.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from model.config import Qwen3Config
from model.inputs import StepInputs
from model.kernels.ahead import compile_ahead
from model.kernels.rows import empty_rows
from model.kernels.runtime import HOPPER_TO_BE, wanted
from model.kernels.shipped import use_shipped
from model.kernels.tilings import ROW_CLASSES
from model.parallel import TensorParallel
from model.peer_sums import Limits, PeerSums, obstacle
from model.qwen3 import Qwen3ForCausalLM
from model.sampler import sample, sample_share
from model.weights import empty_model, load_model
from worker.config import ConfigError, EngineConfig
from worker.handover import Handover, Place
from worker.parent import end_with
from worker.plan import NO_ADMISSION, StepBounds, StepPlan
from worker.runtime import RuntimeConfig, resolve
from worker.shapes import StepShape, input_words, step_shapes
from worker.tables import Rows, SlotTables, upload

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and of how much."""

_RESERVE_BYTES = 512 << 20
"""GPU memory left to what is not counted: CUDA graphs, communication buffers, cuBLAS workspaces."""

_MAX_COMPILING = 16
"""Processes of a node that compile kernels: each takes some 0.3 GB, and the longest kernel 3 s."""

_TRIED_LAYERS = 2  # the last one is followed by another norm

_MIN_SHARED_ROWS = 32
"""From so many rows on, ranks share out the sampling.

Reckoned from figures of an H100, not measured: a second collective takes NCCL some 12 us. What it saves two ranks is
half of what sampling takes (8 us for 8 rows, 28 for 64) and half of gathering the logits (some 50 us for 64 rows by
NCCL; through shared memory it is less, for which this has not been reckoned again).
"""


@dataclass(frozen=True, slots=True)
class _StepGraph:
    """One captured step."""

    shape: StepShape
    graph: torch.cuda.CUDAGraph


@dataclass(slots=True)
class _Launched:
    tokens: torch.Tensor  # [rows] int32, on the host
    done: torch.cuda.Event | None  # None: they are there already


class Runner:
    """One rank's model, tables and KV cache.

    kv_cache: [layers, 2, num_blocks, block_size, kv_heads, head_dim] in the model's dtype.
    share_sampling: of many rows, each rank samples its share.
    """

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tables: SlotTables,
        kv_cache: torch.Tensor,
        runtime: RuntimeConfig,
        tp: TensorParallel,
        *,
        share_sampling: bool,
    ) -> None:
        self._model = model
        self._tp = tp
        self._share_sampling = share_sampling
        self._tables = tables
        self._kv_cache = kv_cache
        self._runtime = runtime
        self._shapes = step_shapes(runtime, model.graphs) if runtime.cuda_graphs else []
        self._graphs: list[_StepGraph] = []  # in the order of the shapes: the first that fits a plan is the cheapest
        self._handover = Handover(
            num_places=runtime.run_ahead + 2,
            num_words=input_words(self._shapes, runtime.max_running),
            num_rows=runtime.max_running,
            device=runtime.device,
        )
        self._in_flight: deque[_Launched] = deque()

    @property
    def num_blocks(self) -> int:
        return self._kv_cache.shape[2]

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> None:
        """Start a step. On a GPU this returns while the device works."""
        if not self._runtime.on_gpu:
            self._in_flight.append(_Launched(self._run_here(plan), None))
            return
        captured = next((captured for captured in self._graphs if captured.shape.fits(plan)), None)
        shape = StepShape.of(plan, self._runtime.max_running) if captured is None else captured.shape
        if len(plan.admissions) and not shape.admits(plan):
            self._tables.admit(plan)
        if not shape.enters(plan):
            self._tables.set_blocks(upload(plan.block_updates, self._runtime.device))
        place = self._take_place(shape, plan)
        if captured is None:
            self._run(shape)
        else:
            captured.graph.replay()
        done = torch.cuda.current_stream().record_event(place.done)
        self._in_flight.append(_Launched(place.tokens[: plan.num_rows], done))

    def collect(self) -> np.ndarray:
        """Wait for the oldest step in flight: [rows] int32 tokens, as `SlotTables.retire` gives them.

        They are good until the next launch.
        """
        launched = self._in_flight.popleft()
        if launched.done is not None:
            launched.done.synchronize()
        return launched.tokens.numpy()

    def _take_place(self, shape: StepShape, plan: StepPlan) -> Place:
        """Return the next step's place, with its input."""
        place = self._handover.take_place()
        shape.fill(place.input.numpy(), plan, self._tables.scratch_slot)
        return place

    def _run_here(self, plan: StepPlan) -> torch.Tensor:
        """The whole step on the CPU; returns [rows] int32."""
        if len(plan.admissions):
            self._tables.admit(plan)
        if len(plan.block_updates):
            self._tables.set_blocks(upload(plan.block_updates, self._runtime.device))
        slots, query_lens = (upload(array, self._runtime.device) for array in (plan.slots, plan.query_lens))
        return self._tables.retire(*self._compute(slots, query_lens, plan.bounds))

    def _run(self, shape: StepShape) -> None:
        """The whole step on a GPU, for the input and the tokens in the step's place."""
        words = self._tables.fetch(self._handover, shape)
        self._tables.retire_to(self._handover, *self._compute(words.slots, words.query_lens, shape.bounds))

    def _compute(self, slots: torch.Tensor, query_lens: torch.Tensor, bounds: StepBounds) -> tuple[Rows, torch.Tensor]:
        """What a step does between its input and its tokens; returns its rows, and what each draws, [rows] int32."""
        inputs, rows = self._tables.prepare(slots, query_lens, bounds)
        return rows, self._draw(self._run_model(inputs, rows, bounds), rows.slots, rows.lengths)

    def _run_model(self, inputs: StepInputs, rows: Rows, bounds: StepBounds) -> torch.Tensor:
        """Return the hidden states of the rows' last tokens."""
        hidden: torch.Tensor = self._model(inputs, self._kv_cache)
        if bounds.max_chunk_rows:  # else each row's only token is its last
            of_rows = empty_rows(len(rows.last_tokens), hidden.shape[1], like=hidden)
            hidden = torch.index_select(hidden, 0, rows.last_tokens, out=of_rows)
        return hidden

    def _draw(self, hidden: torch.Tensor, slots: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Sample from the hidden states of the rows' last tokens: [rows] int32, the same on every rank."""
        tables = self._tables.sampling
        if self._share_sampling and len(slots) >= _MIN_SHARED_ROWS:
            return sample_share(self._model.compute_logits_share(hidden), slots, lengths, tables, self._tp)
        return sample(self._model.compute_logits(hidden), slots, lengths, tables)

    # -- building ------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Run eager steps of every kind on dead rows, so that no request waits for a kernel to be compiled."""
        for plan in self._dead_plans():
            self.launch(plan)
            self.collect()
        self._model.load_kernels(self._runtime.max_batched_tokens)
        self._admit_nobody()
        scratch = np.array([(self._tables.scratch_slot, 0, 0)], np.int32)
        self._tables.set_blocks(upload(scratch, self._runtime.device))  # of more blocks than a step has room for

    @torch.inference_mode()
    def try_out(self) -> None:
        """Launch what `warm_up` does, and what enters blocks, where launches are only tried (`compile_ahead`)."""
        for plan in self._dead_plans():
            words = self._tables.fetch(self._handover, StepShape.of(plan, self._runtime.max_running))
            inputs, rows = self._tables.prepare(words.slots, words.query_lens, plan.bounds)
            rows.last_tokens.zero_()  # PyTorch, which does launch, follows what nobody has written
            drawn = self._draw(self._run_model(inputs, rows, plan.bounds), rows.slots, rows.lengths)
            self._tables.retire_to(self._handover, rows, drawn)
        self._model.load_kernels(self._runtime.max_batched_tokens)
        self._tables.set_blocks(torch.zeros((1, 3), dtype=torch.int32, device=self._runtime.device))
        self._admit_nobody()

    def _admit_nobody(self) -> None:
        nobody = upload(NO_ADMISSION.view(np.int32), self._runtime.device)
        self._tables.admit_records(nobody.view(1, -1), nobody)

    def _dead_plans(self) -> list[StepPlan]:
        """Steps of dead rows that have every kernel there is.

        Those of prompts come first: their attention takes a compiler longer than anything else, which so begins early.
        """
        many = self._runtime.max_running
        few = [rows for rows in ROW_CLASSES if rows < many]  # with kernels of their own
        longest = self._runtime.max_model_len
        most = min(self._runtime.max_batched_tokens, many * longest)
        beside = sorted({0, min(1, many - 1), many - 1})  # a chunk is a row too
        plans = [self._dead_plan(decode_rows, chunk_lens=(16,)) for decode_rows in beside]
        plans.append(self._dead_plan(0, chunk_lens=(1,)))  # its attention is that of decodes beside prompts
        # Tokens of prompts are rows too, of which there may be more than of decodes.
        for rows in sorted({min(rows, most) for rows in ROW_CLASSES if min(rows, most) > many}):
            whole, rest = divmod(rows, longest)
            plans.append(self._dead_plan(0, chunk_lens=[longest] * whole + [rest] * (rest > 0)))
        return plans + [self._dead_plan(decode_rows) for decode_rows in (*few, many)]

    @torch.inference_mode()
    def run_shapes(self) -> None:
        """Run a step of every shape that is to be captured, of nobody: that compiles kernels and sets libraries up."""
        nobody = self._dead_plan(0)
        for shape in self._shapes:
            self._take_place(shape, nobody)
            self._run(shape)
            torch.cuda.synchronize()  # so that the place is free again

    @torch.inference_mode()
    def capture(self, progress: Progress) -> None:
        """Capture the steps, largest first so that the others fit into its memory.

        What a capture must not do, such as to compile a kernel, is done if `run_shapes` has run on this model.
        """
        shapes = sorted(self._shapes, key=lambda shape: -shape.bounds.num_tokens)
        pool = torch.cuda.graph_pool_handle()
        for done, shape in enumerate(shapes):
            progress("capturing CUDA graphs", done, len(shapes))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._run(shape)
            self._graphs.append(_StepGraph(shape, graph))
        self._graphs.sort(key=lambda graph: self._shapes.index(graph.shape))
        torch.cuda.synchronize()

    def _dead_plan(self, decode_rows: int, chunk_lens: Sequence[int] = ()) -> StepPlan:
        """A step of dead rows."""
        query_lens = np.array([1] * decode_rows + list(chunk_lens), np.int32)
        return StepPlan(
            step=0,
            slots=np.full(len(query_lens), self._tables.scratch_slot, np.int32),
            query_lens=query_lens,
            num_decode_rows=decode_rows,
            max_query_len=max(chunk_lens, default=1),
            max_kv_len=self._runtime.max_model_len,
            block_updates=np.empty((0, 3), np.int32),
            admissions=np.empty(0),
            admitted_ids=np.empty(0, np.int32),
        )


def build_runner(
    config: EngineConfig, checkpoint: Qwen3Config, runtime: RuntimeConfig, tp: TensorParallel, progress: Progress
) -> Runner:
    """Load the model, size and allocate the KV cache, capture graphs.

    Raises:
        ModelError: the checkpoint cannot be used.
        ConfigError: the memory does not hold one sequence.
    """
    if runtime.on_gpu:
        use_shipped()
    tp = _with_peer_sums(tp, config, runtime, checkpoint)
    model = load_model(
        _empty_model(checkpoint, runtime, tp),
        config.model,
        device=runtime.device,
        load_format=config.load_format,
        progress=lambda done, total: progress("loading weights", done, total),
    )
    tables, cache_of_one = _tables_of(checkpoint, runtime), _cache_of_one(checkpoint, runtime, tp)
    block_bytes = cache_of_one.nbytes
    share_sampling = bool(_agree(int(_wants_shared_sampling(tp, runtime)), tp, runtime.device))
    if runtime.on_gpu and runtime.attention_backend == "triton":  # others follow what is not written in a trial
        progress("compiling kernels", 0, 0)
        compile_ahead(
            partial(_try_out, model, tables, cache_of_one, runtime, tp, share_sampling=share_sampling),
            processes=min(_MAX_COMPILING, len(os.sched_getaffinity(0))) // len(config.local_ranks),
            settle=partial(end_with, os.getpid()),
            progress=partial(progress, "compiling kernels"),
            begin=config.local_ranks.index(tp.rank) / len(config.local_ranks),
        )
    progress("sizing the KV cache", 0, 0)
    num_blocks = config.num_blocks or _measure_blocks(config, runtime, model, tables, cache_of_one)
    del cache_of_one
    num_blocks = _agree(num_blocks, tp, runtime.device)
    if num_blocks < 1:
        on_gpu = "raise gpu_memory_utilization, lower max_batched_tokens, or use more GPUs"
        remedy = on_gpu if runtime.on_gpu else "raise cpu_kv_gib"
        raise ConfigError(f"no memory for one KV block of {block_bytes} bytes beside weights and activations; {remedy}")
    kv_cache = _allocate(checkpoint, num_blocks, block_bytes, runtime, tp)
    runner = Runner(model, tables, kv_cache, runtime, tp, share_sampling=share_sampling)
    if runtime.on_gpu:
        progress("warming up", 0, 0)
        runner.warm_up()
        with _few_layers(model):  # all before the first capture, since each gives free memory back to the device
            Runner(model, tables, kv_cache[:_TRIED_LAYERS], runtime, tp, share_sampling=share_sampling).run_shapes()
        runner.capture(progress)
    return runner


def try_out_nowhere(config: EngineConfig, checkpoint: Qwen3Config, rank: int) -> None:
    """Try all launches of one rank of a server, whose GPUs, Hoppers that reach one another's memory, are still to be.

    Raises:
        ModelError, ConfigError: no such server could run.
    """
    runtime = resolve(config, checkpoint, rank, HOPPER_TO_BE)
    if runtime.attention_backend != "triton":
        raise ConfigError(f"attention_backend={runtime.attention_backend}: only with triton can launches be tried")
    tp = TensorParallel.single()
    if (size := config.tensor_parallel_size) > 1:
        group = dist.ProcessGroup(rank, size)  # type: ignore[call-arg]  # of which nobody is asked for anything
        shared = _peer_sums(group, runtime, checkpoint) if wanted("symmetric_memory") and config.nodes == 1 else None
        tp = TensorParallel(rank, size, group, shared)
    model = _empty_model(checkpoint, runtime, tp)
    tables, cache_of_one = _tables_of(checkpoint, runtime), _cache_of_one(checkpoint, runtime, tp)
    share_sampling = _wants_shared_sampling(tp, runtime)
    _try_out(model, tables, cache_of_one, runtime, tp, share_sampling=share_sampling)


def _try_out(
    model: Qwen3ForCausalLM,
    tables: SlotTables,
    cache_of_one: torch.Tensor,
    runtime: RuntimeConfig,
    tp: TensorParallel,
    *,
    share_sampling: bool,
) -> None:
    """Try all launches of a server."""
    few = cache_of_one[:_TRIED_LAYERS]
    with _few_layers(model):
        _largest_step(runtime, model, tables, few)
        Runner(model, tables, few, runtime, tp, share_sampling=share_sampling).try_out()


@contextmanager
def _few_layers(model: Qwen3ForCausalLM) -> Iterator[None]:
    """Let a model have few layers meanwhile, since others launch the same."""
    layers = model.model.layers
    model.model.layers = layers[:_TRIED_LAYERS]
    try:
        yield
    finally:
        model.model.layers = layers


def _with_peer_sums(
    tp: TensorParallel, config: EngineConfig, runtime: RuntimeConfig, checkpoint: Qwen3Config
) -> TensorParallel:
    """Let all-reduces and logits go through memory that the GPUs share, if all ranks can."""
    if tp.group is None or not runtime.on_gpu or not wanted("symmetric_memory"):
        return tp
    if config.nodes > 1:  # each has variables of its own, so no collective may depend on them
        logger.info("rank=%d no sums and logits through shared memory: several nodes take part", tp.rank)
        return tp
    reason = obstacle(tp.size, device=runtime.device)
    if not _agree(int(not reason), tp, runtime.device):
        why = reason or "another rank has none"
        logger.info("rank=%d no sums and logits through shared memory: %s", tp.rank, why)
        return tp
    return replace(tp, peer_sums=_peer_sums(tp.group, runtime, checkpoint))


def _peer_sums(group: dist.ProcessGroup, runtime: RuntimeConfig, checkpoint: Qwen3Config) -> PeerSums:
    size, device, dtype = group.size(), runtime.device, runtime.dtype
    summand = runtime.max_batched_tokens * checkpoint.hidden_size
    logits = runtime.max_running * -(-checkpoint.vocab_size // size)  # padded, as the head's weight is
    limits = Limits.of(size, dtype, summand=summand, logits=logits)
    return PeerSums(group, limits, dtype=dtype, device=device)


def _wants_shared_sampling(tp: TensorParallel, runtime: RuntimeConfig) -> bool:
    """Tell whether this rank would share out the sampling of many rows. On a CPU, whether it pays is not known."""
    return tp.group is not None and runtime.on_gpu and wanted("sharded_sampling")


def _empty_model(checkpoint: Qwen3Config, runtime: RuntimeConfig, tp: TensorParallel) -> Qwen3ForCausalLM:
    return empty_model(
        checkpoint,
        tp=tp,
        device=runtime.device,
        dtype=runtime.dtype,
        attention_backend=runtime.attention_backend,
        block_size=runtime.block_size,
        max_model_len=runtime.max_model_len,
    )


def _tables_of(checkpoint: Qwen3Config, runtime: RuntimeConfig) -> SlotTables:
    return SlotTables(
        num_slots=runtime.max_running,
        max_model_len=runtime.max_model_len,
        block_size=runtime.block_size,
        vocab_size=checkpoint.vocab_size,
        device=runtime.device,
    )


def _shape_of_cache(checkpoint: Qwen3Config, num_blocks: int, block_size: int, tp: TensorParallel) -> tuple[int, ...]:
    of_block = (block_size, checkpoint.kv_heads_per_rank(tp.size), checkpoint.head_dim)
    return (checkpoint.num_hidden_layers, 2, num_blocks, *of_block)


def _cache_of_one(checkpoint: Qwen3Config, runtime: RuntimeConfig, tp: TensorParallel) -> torch.Tensor:
    """Return a KV cache of one block."""
    shape = _shape_of_cache(checkpoint, 1, runtime.block_size, tp)
    return torch.zeros(shape, dtype=runtime.dtype, device=runtime.device)


def _allocate(
    checkpoint: Qwen3Config, num_blocks: int, block_bytes: int, runtime: RuntimeConfig, tp: TensorParallel
) -> torch.Tensor:
    shape = _shape_of_cache(checkpoint, num_blocks, runtime.block_size, tp)
    try:
        # Zeros, not garbage: attention multiplies masked values by zero, and a NaN would survive that.
        return torch.zeros(shape, dtype=runtime.dtype, device=runtime.device)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        raise ConfigError(
            f"{num_blocks} KV blocks need {num_blocks * block_bytes / 2**30:.1f} GiB, "
            f"which {runtime.device} does not have; lower num_blocks"
        ) from error


def _agree(number: int, tp: TensorParallel, device: torch.device) -> int:
    """The smallest of all ranks' numbers: a block must exist on every rank, and no rank do what another does not."""
    if tp.group is None:
        return number
    smallest = torch.tensor([number], dtype=torch.int64, device=device)
    dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=tp.group)
    return int(smallest.item())


def _measure_blocks(
    config: EngineConfig,
    runtime: RuntimeConfig,
    model: Qwen3ForCausalLM,
    tables: SlotTables,
    cache_of_one: torch.Tensor,
) -> int:
    """KV blocks that fit beside weights, tables and the largest step."""
    block_bytes = cache_of_one.nbytes
    if not runtime.on_gpu:
        useful = runtime.max_running * tables.max_blocks  # more could never be held at once
        return min(useful, int(config.cpu_kv_gib * 2**30) // block_bytes)
    device = runtime.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _largest_step(runtime, model, tables, cache_of_one)
    torch.cuda.synchronize(device)
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    steps = 2 if runtime.cuda_graphs else 1  # graphs keep memory of their own, beside that of eager steps
    usable = free - int((1 - config.gpu_memory_utilization) * total) - steps * step_bytes - _RESERVE_BYTES
    logger.info(
        "kv sizing free_gib=%.1f step_gib=%.2f usable_gib=%.1f", free / 2**30, step_bytes / 2**30, usable / 2**30
    )
    return max(0, usable // block_bytes)


@torch.inference_mode()
def _largest_step(
    runtime: RuntimeConfig, model: Qwen3ForCausalLM, tables: SlotTables, cache_of_one: torch.Tensor
) -> None:
    """Run a step of the most tokens and rows that can come, all of them dead: its shapes, nothing read or written."""
    device, rows, tokens = runtime.device, runtime.max_running, runtime.max_batched_tokens
    inputs = StepInputs(
        token_ids=torch.zeros(tokens, dtype=torch.int32, device=device),
        positions=torch.zeros(tokens, dtype=torch.int32, device=device),
        kv_slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
        query_starts=torch.linspace(0, tokens, rows + 1, device=device).int(),
        kv_lens=torch.zeros(rows, dtype=torch.int32, device=device),
        block_tables=torch.zeros((rows, tables.max_blocks), dtype=torch.int32, device=device),
        num_decode_rows=0,
        max_single_rows=rows,
        max_chunk_rows=rows,
        max_query_len=tokens,
        max_kv_len=runtime.max_model_len,
    )
    hidden = model(inputs, cache_of_one)
    logits = model.compute_logits(hidden[:rows])
    slots = torch.full((rows,), tables.scratch_slot, dtype=torch.int32, device=device)
    sample(logits, slots, torch.ones(rows, dtype=torch.int32, device=device), tables.sampling)
