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
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from model.config import Qwen3Config
from model.errors import ModelError
from model.kernels.runtime import unwanted
from model.parallel import TensorParallel
from worker import rendezvous
from worker.channel import GatewayChannel, PlanReceiver, PlanSender
from worker.children import RankSpec
from worker.config import ConfigError, EngineConfig
from worker.control import ChildEnd, Fatal, Heartbeat, Progress, Up
from worker.follower import Follower
from worker.leader import LINGER_S, Leader
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
    if without := unwanted():
        logger.warning("rank=%d goes without: %s", spec.rank, ", ".join(sorted(without)))
    tp, plans = join(spec, runtime)

    def progress(what: str, done: int, total: int) -> None:
        if spec.rank == config.local_ranks.start:
            control.send(Progress(what, done, total))

    started = time.monotonic()
    runner = build_runner(config, checkpoint, runtime, tp, progress)
    logger.info("rank=%d ready seconds=%.1f blocks=%d", spec.rank, time.monotonic() - started, runner.num_blocks)
    beat = _Beat(control, runtime.hang_timeout_s)
    if isinstance(plans, PlanReceiver):
        follower = Follower(runner, plans, run_ahead=runtime.run_ahead, heartbeat=beat)
        control.send(Up({}))
        beat(0)
        return follower.step
    leader = _make_leader(spec, checkpoint, runtime, runner, plans, beat)
    control.send(Up({}))
    beat(0)
    return leader.step


def _make_leader(
    spec: RankSpec,
    checkpoint: Qwen3Config,
    runtime: RuntimeConfig,
    runner: Runner,
    plans: PlanSender | None,
    beat: Callable[[int], None],
) -> Leader:
    if spec.gateways is None:
        raise ValueError("the leader needs an address to listen on for gateways")
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
        max_mixed_tokens=runtime.max_mixed_tokens,
        block_size=runtime.block_size,
        num_blocks=runner.num_blocks,
        watermark_blocks=int(config.admission_watermark * runner.num_blocks),
        prefix_caching=config.prefix_caching,
    )
    if plans is not None:
        plans.gather()
    return Leader(
        Scheduler(limits, hash_key=secrets.token_bytes(32), clock=time.monotonic),
        runner,
        GatewayChannel(spec.gateways),
        info,
        run_ahead=runtime.run_ahead,
        clock=time.monotonic,
        broadcast=plans.send if plans is not None else None,
        heartbeat=beat,
        linger_s=LINGER_S if runtime.on_gpu else 0.0,
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


def join(spec: RankSpec, runtime: RuntimeConfig) -> tuple[TensorParallel, PlanSender | PlanReceiver | None]:
    """Take this rank's device; form the tensor-parallel group, and this rank's end of the plan channel.

    On one machine everything stays there: a file to meet at, the loopback interface, a private socket for plans. With
    several nodes the ranks meet at node 0's store, use the interface that leads there, and the leader's socket has a
    second address, for followers elsewhere.
    """
    config = spec.config
    _set_up_device(runtime, config.local_size)
    if config.tensor_parallel_size == 1:
        return TensorParallel.single(), None
    if config.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        plans = _plans(spec, None)
        _form_group(spec, runtime, init_method=spec.rendezvous)
    else:
        rendezvous.choose_interface(config)
        store = rendezvous.connect_store(config)
        plans = _plans(spec, store)
        _form_group(spec, runtime, store=dist.PrefixStore("group", store))  # type: ignore[attr-defined]
    return TensorParallel(rank=spec.rank, size=config.tensor_parallel_size, group=dist.group.WORLD), plans


def _set_up_device(runtime: RuntimeConfig, local_size: int) -> None:
    if runtime.on_gpu:
        torch.cuda.set_device(runtime.device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))


def _form_group(spec: RankSpec, runtime: RuntimeConfig, **meeting: Any) -> None:
    dist.init_process_group(
        "nccl" if runtime.on_gpu else "gloo",
        rank=spec.rank,
        world_size=spec.config.tensor_parallel_size,
        timeout=JOIN_TIMEOUT,
        device_id=runtime.device if runtime.on_gpu else None,
        **meeting,
    )


def _plans(spec: RankSpec, store: Any) -> PlanSender | PlanReceiver:
    config = spec.config
    if spec.rank == 0:
        sender = PlanSender(spec.plans, config.tensor_parallel_size - 1)
        if store is not None:
            rendezvous.publish_plans(config, store, sender)
        return sender
    if store is None or config.node_rank == 0:
        return PlanReceiver(spec.plans)
    return PlanReceiver(rendezvous.find_plans(config, store))


class _Beat:
    """Tells the supervisor that the loop turns, not more often than is useful."""

    def __init__(self, control: ChildEnd, patience_s: float) -> None:
        self._control = control
        self._patience_s = patience_s
        self._last = 0.0

    def __call__(self, steps: int) -> None:
        now = time.monotonic()
        if now - self._last >= HEARTBEAT_S:
            self._last = now
            self._control.send(Heartbeat(steps, self._patience_s))
