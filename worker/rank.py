"""What runs in a rank's process: join the others, build the runner, then lead or follow until ended.

A rank is ended by a signal and cleans nothing up: it owns no file and no name that could outlive it.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from model.config import Qwen3Config
from model.errors import ModelError
from model.parallel import TensorParallel
from worker.channel import GatewayChannel, PlanReceiver, PlanSender
from worker.client import EngineEndpoint
from worker.config import ConfigError, EngineConfig
from worker.control import ChildEnd, Fatal, Heartbeat, Progress, Up
from worker.follower import Follower
from worker.leader import Leader
from worker.messages import EngineInfo
from worker.runner import Runner, build_runner
from worker.runtime import RuntimeConfig, resolve
from worker.scheduler import Scheduler, SchedulerLimits

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
JOIN_TIMEOUT = timedelta(minutes=10)

_TOO_LITTLE_MEMORY = (
    "the GPU's memory does not hold the weights and one step; raise tensor_parallel_size, lower max_batched_tokens or "
    "max_running, or end what else uses the GPU"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSpec:
    """Which rank this is, and where the others are."""

    rank: int
    epoch: int
    config: EngineConfig
    gateways: EngineEndpoint  # the leader listens there
    plans: EngineEndpoint  # followers listen there to the leader
    rendezvous: str  # path of a file that all ranks can open


def run_rank(spec: RankSpec, control: ChildEnd) -> int:
    """Run until the process is ended; returns, with an exit code, only when a user must mend something first."""
    try:
        turn = _prepare(spec, control)
    except (ModelError, ConfigError) as error:
        control.send(Fatal(str(error)))
        return 2
    except torch.OutOfMemoryError:
        control.send(Fatal(_TOO_LITTLE_MEMORY))
        return 2
    gc.collect()
    gc.freeze()  # what lives now lives as long as the process: the collector need not look at it again
    while True:
        turn()


def _prepare(spec: RankSpec, control: ChildEnd) -> Callable[[], None]:
    config = spec.config
    checkpoint = Qwen3Config.from_folder(config.model)
    checkpoint.check_parallel(config.tensor_parallel_size)
    runtime = resolve(config, checkpoint, spec.rank)
    _set_up_device(runtime, config.tensor_parallel_size)
    tp = _join(spec, runtime)

    def progress(what: str, done: int, total: int) -> None:
        if spec.rank == 0:
            control.send(Progress(what, done, total))

    started = time.monotonic()
    runner = build_runner(config, checkpoint, runtime, tp, progress)
    logger.info("rank=%d ready seconds=%.1f blocks=%d", spec.rank, time.monotonic() - started, runner.num_blocks)
    beat = _Beat(control)
    if spec.rank > 0:
        follower = Follower(runner, PlanReceiver(spec.plans), run_ahead=runtime.run_ahead, heartbeat=beat)
        control.send(Up({"hang_timeout_s": runtime.hang_timeout_s}))
        return follower.step
    leader = _make_leader(spec, checkpoint, runtime, runner, beat)
    control.send(Up({"hang_timeout_s": runtime.hang_timeout_s}))
    return leader.step


def _make_leader(
    spec: RankSpec, checkpoint: Qwen3Config, runtime: RuntimeConfig, runner: Runner, beat: Callable[[int], None]
) -> Leader:
    config = spec.config
    size = config.tensor_parallel_size
    max_model_len = _fit_model_len(config, runtime, runner.num_blocks)
    info = EngineInfo(
        epoch=spec.epoch,
        model_path=config.model,
        vocab_size=checkpoint.vocab_size,
        max_model_len=max_model_len,
        block_size=runtime.block_size,
        num_blocks=runner.num_blocks,
        max_running=runtime.max_running,
        max_batched_tokens=runtime.max_batched_tokens,
        tensor_parallel_size=size,
        device=torch.cuda.get_device_name(runtime.device) if runtime.on_gpu else "cpu",
        dtype=str(runtime.dtype).removeprefix("torch."),
        attention_backend=runtime.attention_backend,
        prefix_caching=config.prefix_caching,
    )
    limits = SchedulerLimits(
        vocab_size=checkpoint.vocab_size,
        max_model_len=max_model_len,
        max_running=runtime.max_running,
        max_batched_tokens=runtime.max_batched_tokens,
        block_size=runtime.block_size,
        num_blocks=runner.num_blocks,
        watermark_blocks=int(config.admission_watermark * runner.num_blocks),
        prefix_caching=config.prefix_caching,
    )
    broadcast = None
    if size > 1:
        sender = PlanSender(spec.plans, size - 1)
        sender.gather()
        broadcast = sender.send
    return Leader(
        Scheduler(limits, hash_key=secrets.token_bytes(32), clock=time.monotonic),
        runner,
        GatewayChannel(spec.gateways),
        info,
        run_ahead=runtime.run_ahead,
        clock=time.monotonic,
        broadcast=broadcast,
        heartbeat=beat,
    )


def _fit_model_len(config: EngineConfig, runtime: RuntimeConfig, num_blocks: int) -> int:
    """The longest sequence, cut to what all KV blocks together hold: a lone sequence must always be able to finish."""
    capacity = num_blocks * runtime.block_size
    if capacity >= runtime.max_model_len:
        return runtime.max_model_len
    if config.max_model_len is not None:
        raise ConfigError(
            f"max_model_len={config.max_model_len} does not fit the KV cache of {num_blocks} blocks of "
            f"{runtime.block_size} tokens; lower it to {capacity}, or give the KV cache more memory"
        )
    logger.warning("max_model_len cut from %d to %d: the KV cache holds no more", runtime.max_model_len, capacity)
    return capacity


def _set_up_device(runtime: RuntimeConfig, tp_size: int) -> None:
    if runtime.on_gpu:
        torch.cuda.set_device(runtime.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // tp_size))


def _join(spec: RankSpec, runtime: RuntimeConfig) -> TensorParallel:
    """Form the tensor-parallel group. Its sockets stay on the loopback interface."""
    size = spec.config.tensor_parallel_size
    if size == 1:
        return TensorParallel.single()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if runtime.on_gpu else "gloo",
        init_method=f"file://{spec.rendezvous}",
        rank=spec.rank,
        world_size=size,
        timeout=JOIN_TIMEOUT,
        device_id=runtime.device if runtime.on_gpu else None,
    )
    return TensorParallel(rank=spec.rank, size=size, group=dist.group.WORLD)


class _Beat:
    """Tells the supervisor that the loop turns, not more often than is useful."""

    def __init__(self, control: ChildEnd) -> None:
        self._control = control
        self._last = 0.0

    def __call__(self, steps: int) -> None:
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_S:
            self._last = now
            self._control.send(Heartbeat(steps))
