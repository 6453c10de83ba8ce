"""What gateway and leader say to each other: typed msgpack over a local ZeroMQ socket, no pickle.

Token ids travel as little-endian int32 bytes (`ids_to_bytes`, `ids_from_bytes`). All times are `time.monotonic()`
seconds, which on one host mean the same in every process. A request is named by a number that its gateway chose;
numbers of different gateways may coincide, the leader tells them apart by the connection.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec
import numpy as np

PROTOCOL_VERSION = 1

MAX_STOP_IDS = 32
"""Stop and end-of-sequence ids of one request together; the device table has that many columns."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose the next token; every default is neutral. Order: penalties, temperature, top-k, top-p, min-p."""

    temperature: float = 1.0  # 0 = greedy
    top_k: int = 0  # 0 = off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0  # unsigned 64 bits

    @property
    def penalizes(self) -> bool:
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0.0, 0.0, 1.0)


class FinishReason(enum.Enum):
    """Why the engine ended a sequence. Stop strings are the gateway's business: to the engine they are an abort."""

    EOS = "eos"
    STOP_TOKEN = "stop_token"
    MAX_TOKENS = "max_tokens"
    CONTEXT_FULL = "context_full"
    BROKEN = "broken"  # the model gave NaN; `Finished.detail` says so
    ABORTED = "aborted"
    REJECTED = "rejected"  # the engine's door refused it; `Finished.detail` says why


# ---- gateway -> leader -----------------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a connection; anything else from a peer that did not say it is dropped."""

    secret: bytes
    version: int = PROTOCOL_VERSION


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """Run a request. A resumed one (after the ranks were restarted) carries what it had already produced."""

    request: int
    epoch: int  # of the leader that it is meant for; others drop it
    prompt: bytes  # int32 ids
    output: bytes = b""  # int32 ids produced before a restart
    sampling: SamplingParams
    max_tokens: int  # output tokens in all, resumed ones included
    min_tokens: int = 0
    eos_ids: tuple[int, ...] = ()  # empty with ignore_eos
    stop_ids: tuple[int, ...] = ()
    cache_salt: bytes = b""  # requests with different salts never share KV blocks
    use_prefix_cache: bool = True


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    requests: list[int]


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Forget the prefix cache: what running sequences hold stays with them, but nobody finds it any more."""

    ticket: int


class Goodbye(msgspec.Struct, frozen=True, tag="bye"):
    """The gateway leaves; whatever it still has running is aborted."""


# ---- leader -> gateway -----------------------------------------------------------------------------------------------


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine finally runs with; constant for one epoch."""

    epoch: int  # counts the starts of the ranks, from 1
    model_path: str
    vocab_size: int
    max_model_len: int
    block_size: int
    num_blocks: int
    max_running: int
    max_batched_tokens: int
    tensor_parallel_size: int
    device: str
    dtype: str
    attention_backend: str
    prefix_caching: bool


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """Gauges, and counters since the epoch began. Sent with all that a step has for a gateway, and when idle."""

    step: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    blocks_used: int = 0  # held by running sequences
    blocks_cached: int = 0  # free, content kept for the prefix cache
    blocks_total: int = 0
    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0  # computed
    generated_tokens: int = 0
    # of the step that this message reports (0 when idle, or when another gateway is told)
    step_rows: int = 0
    step_tokens: int = 0
    step_seconds: float = 0.0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    info: EngineInfo
    stats: EngineStats


class Started(msgspec.Struct, frozen=True, array_like=True):
    """The sequence was planned for the first time, or for the first time since it was preempted."""

    request: int
    cached_tokens: int
    scheduled_at: float
    again: bool = False


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """Last word on a request, after its last token; its KV blocks are free by then or after the step in flight."""

    request: int
    reason: FinishReason
    stop_id: int = -1  # EOS, STOP_TOKEN: the id that ended it (it is the last token of the output)
    detail: str = ""


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    """All that one step has for one gateway: row i of `requests` got token i of `tokens`."""

    requests: bytes  # int64
    tokens: bytes  # int32
    started: list[Started]
    finished: list[Finished]
    stats: EngineStats


class CacheFlushed(msgspec.Struct, frozen=True, tag="flushed"):
    ticket: int
    blocks: int


ToLeader = Hello | Submit | Abort | FlushCache | Goodbye
ToGateway = Ready | Outputs | CacheFlushed


def ids_to_bytes(ids: Sequence[int] | np.ndarray) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def ids_from_bytes(data: bytes) -> np.ndarray:
    """[n] int32, read-only view of `data`."""
    return np.frombuffer(data, dtype="<i4")
