"""A leader without a model: speaks the real protocol on a real socket, from a thread of its own.

Tokens follow a rule, one for each running request and step, so that a test knows what has to arrive. The test sets how
fast it goes, when it holds, dies and starts again, and looks at what it was told.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from worker.endpoint import EngineEndpoint
from worker.messages import (
    Abort,
    CacheFlushed,
    EngineInfo,
    EngineStats,
    Finished,
    FinishReason,
    FlushCache,
    Goodbye,
    Hello,
    Outputs,
    Ready,
    Started,
    Submit,
    ToGateway,
    ToLeader,
    ids_from_bytes,
    ids_to_bytes,
)

VOCAB_SIZE = 1024
MAX_MODEL_LEN = 256

Rule = Callable[[list[int], int], int]


def private_endpoint() -> EngineEndpoint:
    return EngineEndpoint(f"ipc://@lightqwen-test-{secrets.token_hex(8)}", secrets.token_bytes(16))


def count_up(prompt: list[int], position: int) -> int:
    """The default rule: tokens that tell their position and depend on the prompt; never a special one."""
    return (sum(prompt) + position) % 900 + 50


def script(tokens: list[int]) -> Rule:
    """These tokens, then the first of them for ever."""
    return lambda prompt, position: tokens[position] if position < len(tokens) else tokens[0]


@dataclass
class _Running:
    peer: bytes
    submit: Submit
    prompt: list[int]
    output: list[int]
    announced: bool = False


@dataclass
class FakeLeader:
    """Use as a context manager. Attributes may be set while it runs."""

    endpoint: EngineEndpoint
    rule: Rule = count_up
    step_s: float = 0.002
    epoch: int = 1
    cached_tokens: int = 0
    preempts_after: set[int] = field(default_factory=set)  # so many tokens of output
    blocks_total: int = 100
    tensor_parallel_size: int = 1
    reject: str = ""
    """Refuse everything with this detail."""
    end_with: FinishReason | None = None
    """End everything with this at the next step."""
    hold_start: bool = False
    """Begin with nothing."""
    hold: bool = False
    """Make no step."""
    submits: list[Submit] = field(default_factory=list)
    aborts: list[int] = field(default_factory=list)
    aborted_at: list[float] = field(default_factory=list)
    goodbyes: int = 0
    strangers: int = 0
    steps: int = 0
    generated: int = 0
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        self.running: dict[tuple[bytes, int], _Running] = {}
        self._peers: set[bytes] = set()
        self._stop = threading.Event()
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._guarded, name="fake-leader", daemon=True)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToLeader).decode

    def __enter__(self) -> FakeLeader:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._bind()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.die()
        if self._crash is not None:
            raise self._crash

    def die(self) -> None:
        """Stop without a word, as a killed process does."""
        if not self._stop.is_set():
            self._stop.set()
            self._thread.join(5)
            self._socket.close()
            self._context.term()

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            epoch=self.epoch,
            model_path="fake",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            block_size=16,
            num_blocks=self.blocks_total,
            max_running=64,
            max_batched_tokens=512,
            tensor_parallel_size=self.tensor_parallel_size,
            device="cpu",
            dtype="float32",
            attention_backend="torch",
            prefix_caching=True,
        )

    @property
    def stats(self) -> EngineStats:
        waiting = [r for r in self.running.values() if not r.announced]
        running = len(self.running) - len(waiting)
        return EngineStats(
            step=self.steps,
            running=running,
            waiting=len(waiting),
            waiting_tokens=sum(len(r.prompt) for r in waiting),
            blocks_used=running,
            blocks_total=self.blocks_total,
            generated_tokens=self.generated,
            prompt_tokens=self.prompt_tokens,
            preemptions=0,
            step_rows=running,
            step_tokens=running,
            step_seconds=self.step_s,
        )

    # -- on its thread -------------------------------------------------------------------------------------------------

    def _bind(self) -> None:
        """A leader that died a moment ago may still hold the address."""
        for _ in range(100):
            try:
                self._socket.bind(self.endpoint.address)
                return
            except zmq.ZMQError:
                time.sleep(0.02)
        raise RuntimeError("the address stays taken")

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._crash = error

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            wait = max(0.0, due - time.monotonic()) if self.running else 0.02
            if self._socket.poll(min(20, round(wait * 1000))):
                self._receive()
            if time.monotonic() >= due and not self.hold:
                self._step()
                due = time.monotonic() + self.step_s

    def _send(self, peer: bytes, message: ToGateway) -> None:
        self._socket.send_multipart([peer, self._encode(message)])

    def _receive(self) -> None:
        while True:
            try:
                peer, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            payload = parts[-1] if parts else b""
            if not payload:
                if peer not in self._peers:
                    self._socket.send_multipart([peer, b""])
                continue
            self._take(peer, self._decode(payload))

    def _take(self, peer: bytes, message: ToLeader) -> None:
        if isinstance(message, Hello):
            if message.secret != self.endpoint.secret:
                self.strangers += 1
                return
            self._peers.add(peer)
            self._send(peer, Ready(info=self.info, stats=self.stats))
        elif peer not in self._peers:
            self.strangers += 1
        elif isinstance(message, Submit):
            self._submit(peer, message)
        elif isinstance(message, Abort):
            self._abort(peer, message.requests)
        elif isinstance(message, FlushCache):
            self._send(peer, CacheFlushed(message.ticket, 7))
        elif isinstance(message, Goodbye):
            self.goodbyes += 1
            self.running = {key: r for key, r in self.running.items() if key[0] != peer}

    def _submit(self, peer: bytes, message: Submit) -> None:
        if message.epoch != self.epoch:
            return
        self.submits.append(message)
        if self.reject:
            self._end(peer, [Finished(message.request, FinishReason.REJECTED, detail=self.reject)])
            return
        prompt, output = ids_from_bytes(message.prompt).tolist(), ids_from_bytes(message.output).tolist()
        self.running[peer, message.request] = _Running(peer, message, prompt, output)

    def _abort(self, peer: bytes, requests: list[int]) -> None:
        self.aborts += requests
        self.aborted_at += [time.monotonic()] * len(requests)
        known = [request for request in requests if self.running.pop((peer, request), None) is not None]
        self._end(peer, [Finished(request, FinishReason.ABORTED) for request in known])

    def _end(self, peer: bytes, finished: list[Finished]) -> None:
        self._send(peer, Outputs(requests=b"", tokens=b"", started=[], finished=finished, stats=self.stats))

    def _step(self) -> None:
        rows = [r for r in self.running.values() if r.announced or not self.hold_start]
        if not rows:
            return
        self.steps += 1
        for peer in {row.peer for row in rows}:
            self._step_peer(peer, [row for row in rows if row.peer == peer])

    def _step_peer(self, peer: bytes, rows: list[_Running]) -> None:
        numbers, tokens, started, finished = [], [], [], []
        for row in rows:
            number = row.submit.request
            if not row.announced:
                row.announced = True
                self.prompt_tokens += len(row.prompt)
                started.append(Started(number, self.cached_tokens, time.monotonic()))
            elif len(row.output) in self.preempts_after:
                started.append(Started(number, 0, time.monotonic(), again=True))
            token = self.rule(row.prompt, len(row.output))
            row.output.append(token)
            numbers.append(number)
            tokens.append(token)
            self.generated += 1
            if (end := self._why_end(row, token)) is not None:
                finished.append(end)
                del self.running[peer, number]
        self._send(
            peer,
            Outputs(
                requests=np.array(numbers, "<i8").tobytes(),
                tokens=ids_to_bytes(tokens),
                started=started,
                finished=finished,
                stats=self.stats,
            ),
        )

    def _why_end(self, row: _Running, token: int) -> Finished | None:
        submit = row.submit
        if self.end_with is not None:
            return Finished(submit.request, self.end_with, detail="as the test wanted")
        if len(row.output) >= submit.min_tokens and token in submit.eos_ids:
            return Finished(submit.request, FinishReason.EOS, stop_id=token)
        if len(row.output) >= submit.min_tokens and token in submit.stop_ids:
            return Finished(submit.request, FinishReason.STOP_TOKEN, stop_id=token)
        if len(row.output) >= submit.max_tokens:
            return Finished(submit.request, FinishReason.MAX_TOKENS)
        if len(row.prompt) + len(row.output) >= MAX_MODEL_LEN:
            return Finished(submit.request, FinishReason.CONTEXT_FULL)
        return None
