"""A real gateway on a real port, in front of a fake leader on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lightqwen.v1 import (
    admin_pb2_grpc,
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2_grpc,
)
from service.config import ServeConfig
from service.server import Gateway
from tests.service.fake_leader import VOCAB_SIZE, FakeLeader, private_endpoint
from worker.config import ConfigError
from worker.control import ChildEnd, Stop, SupervisorEnd, Up

EOS = "<|im_end|>"
SPECIAL = ("<|endoftext|>", "<|im_start|>", EOS)
NOT_SPECIAL = ("<think>", "</think>")

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if shout %}{{ raise_exception('do not shout') }}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE as Qwen's: all bytes, a few merges, special tokens of which two are ordinary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
    )
    words = "the quick brown fox jumps over the lazy dog, and then hello world again; żółw 你好 🙂 café\n"
    tokenizer.train_from_iterator([words] * 4, trainer)
    tokenizer.add_tokens(list(NOT_SPECIAL))
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the gateway reads of a checkpoint: everything but weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id(EOS)
    (folder / "config.json").write_text(
        json.dumps({"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096, "eos_token_id": eos})
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": [eos, 0]})
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, "eos_token": EOS}))
    return folder


@pytest.fixture
def bare_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """One without a tokenizer."""
    folder = tmp_path / "bare"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.fixture
def leader() -> Iterator[FakeLeader]:
    with FakeLeader(private_endpoint()) as leader:
        yield leader


@dataclass
class Served:
    """A running gateway with a channel to it."""

    gateway: Gateway
    leader: FakeLeader
    supervisor: SupervisorEnd
    running: asyncio.Task[int]
    facts: dict[str, Any]
    channel: grpc.aio.Channel

    def __post_init__(self) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.model: Any = model_pb2_grpc.ModelServiceStub(self.channel)
        self.admin: Any = admin_pb2_grpc.AdminServiceStub(self.channel)

    @property
    def address(self) -> str:
        return str(self.facts["address"])

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where it does not exist yet."""
        value = self.gateway._metrics.registry.get_sample_value(f"lightqwen_{name}", {"model": "tiny", **labels})
        return 0.0 if value is None else value


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(leader: FakeLeader, checkpoint: Path) -> Serve:
    """`async with serve(option=...) as served`: a gateway with these options, stopped at the end."""

    @contextlib.asynccontextmanager
    async def start(*, wait: bool = True, number: int = 0, **options: Any) -> AsyncIterator[Served]:
        settings: dict[str, Any] = {"model": str(checkpoint), "port": 0, "metrics_port": -1, "drain_timeout_s": 5.0}
        config = ServeConfig(**(settings | options))
        ours, theirs = multiprocessing.Pipe()
        gateway = Gateway(config, leader.endpoint, ChildEnd(theirs), number)
        running = asyncio.create_task(gateway.run())
        supervisor = SupervisorEnd(ours)
        try:
            facts = await _facts(supervisor, running) if wait else {"address": await _address(gateway, running)}
            async with grpc.aio.insecure_channel(str(facts["address"])) as channel:
                yield Served(gateway, leader, supervisor, running, facts, channel)
        finally:
            if not running.done():
                supervisor.send(Stop())
            with contextlib.suppress(ConfigError):  # what a test provoked it has seen already
                await asyncio.wait_for(running, 10)
            ours.close()
            theirs.close()

    return start


async def _facts(supervisor: SupervisorEnd, running: asyncio.Task[int]) -> dict[str, Any]:
    while not running.done():
        if (up := first_up(supervisor)) is not None:
            return up.facts
        await asyncio.sleep(0.005)
    raise AssertionError(f"the gateway ended: {running.exception() or running.result()!r}")


def first_up(supervisor: SupervisorEnd) -> Up | None:
    """The gateway's `Up`, if it is among what it has said since the last time."""
    return next((message for message in supervisor.receive() if isinstance(message, Up)), None)


async def _address(gateway: Gateway, running: asyncio.Task[int]) -> str:
    while not gateway.port:
        await asyncio.sleep(0.005)
        if running.done():
            running.result()
    return f"127.0.0.1:{gateway.port}"


@pytest.fixture
async def served(serve: Serve) -> AsyncIterator[Served]:
    async with serve() as served:
        yield served


# ---- helpers for tests -----------------------------------------------------------------------------------------------


def ids(*tokens: int) -> common_pb2.Prompt:
    return common_pb2.Prompt(token_ids=common_pb2.TokenIds(ids=tokens))


def generate_request(
    prompt: common_pb2.Prompt | str = "", *, max_tokens: int | None = 8, **fields: Any
) -> generation_pb2.GenerateRequest:
    """A request for the prompt's continuation; a str is a text prompt. Both text and ids come back."""
    if isinstance(prompt, str):
        prompt = common_pb2.Prompt(text=prompt)
    request = generation_pb2.GenerateRequest(prompt=prompt, **fields)
    if max_tokens is not None:
        request.stopping.max_tokens = max_tokens
    if not request.HasField("output"):
        request.output.token_ids = True
    return request


@dataclass
class Collected:
    started: generation_pb2.Started
    deltas: list[generation_pb2.Delta]
    finished: generation_pb2.Finished

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


async def collect(call: Any) -> Collected:
    """Read a stream to its end, and check its order on the way."""
    responses = [response async for response in call]
    kinds = [response.WhichOneof("event") for response in responses]
    assert kinds == ["started", *["delta"] * (len(kinds) - 2), "finished"]
    deltas = [response.delta for response in responses[1:-1]]
    return Collected(responses[0].started, deltas, responses[-1].finished)


async def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is waited for is another thread's
            await asyncio.sleep(0.005)
