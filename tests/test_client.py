"""The client against a real gRPC server with a servicer that answers from a script."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import code_pb2, error_details_pb2, status_pb2

from lightqwen.client import (
    AsyncClient,
    Chat,
    Client,
    Delta,
    Finished,
    FinishReason,
    LightqwenError,
    Started,
    build_chat,
    build_request,
)
from lightqwen.v1 import admin_pb2, admin_pb2_grpc, generation_pb2, generation_pb2_grpc, model_pb2, model_pb2_grpc
from lightqwen.v1.common_pb2 import Role, Usage
from lightqwen.v1.generation_pb2 import GenerateRequest, GenerateResponse


@dataclass
class Script:
    """What the fake servicer does next, and what it saw."""

    pieces: tuple[str, ...] = ("Hel", "", "lo")
    refuse: list[status_pb2.Status] = field(default_factory=list)  # one for each call, then it answers
    before_refusal: Callable[[], object] = lambda: None
    fail_after_pieces: bool = False
    endless: bool = False
    requests: list[Any] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


class Generation(generation_pb2_grpc.GenerationServiceServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(self, request: GenerateRequest, context: grpc.ServicerContext) -> Iterator[GenerateResponse]:
        script = self.script
        script.requests.append(request)
        script.metadata.append(dict(context.invocation_metadata()))
        context.add_callback(script.ended.set)
        if script.refuse:
            script.before_refusal()
            _abort(context, script.refuse.pop(0))
        yield GenerateResponse(started=Started(request_id="r1", prompt_tokens=3))
        for piece in script.pieces:
            yield GenerateResponse(delta=Delta(text=piece))
        if script.fail_after_pieces:
            context.abort(grpc.StatusCode.INTERNAL, "rank 1 is gone")
        if script.endless:
            script.ended.wait(30)
            return
        yield GenerateResponse()  # a kind of event that this client does not know yet
        usage = Usage(prompt_tokens=3, output_tokens=2)
        yield GenerateResponse(finished=Finished(finish_reason=FinishReason.FINISH_REASON_EOS, usage=usage))

    def Tokenize(self, request: Any, context: grpc.ServicerContext) -> generation_pb2.TokenizeResponse:
        self.script.requests.append(request)
        return generation_pb2.TokenizeResponse(token_ids=[5, 6], count=2, rendered_prompt="hi")

    def Detokenize(self, request: Any, context: grpc.ServicerContext) -> generation_pb2.DetokenizeResponse:
        return generation_pb2.DetokenizeResponse(text=" ".join(map(str, request.token_ids)))


class Model(model_pb2_grpc.ModelServiceServicer):
    def GetModel(self, request: Any, context: grpc.ServicerContext) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(name="tiny", context_length=4096)

    def GetServerInfo(self, request: Any, context: grpc.ServicerContext) -> model_pb2.GetServerInfoResponse:
        return model_pb2.GetServerInfoResponse(version="9", tensor_parallel_size=2)


class Admin(admin_pb2_grpc.AdminServiceServicer):
    def GetLoad(self, request: Any, context: grpc.ServicerContext) -> admin_pb2.GetLoadResponse:
        return admin_pb2.GetLoadResponse(load=admin_pb2.Load(running=7))


def _abort(context: grpc.ServicerContext, status: status_pb2.Status) -> None:
    trailers: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if status.code in (code_pb2.RESOURCE_EXHAUSTED, code_pb2.UNAVAILABLE):
        trailers.append(("grpc-retry-pushback-ms", "20"))
    context.set_trailing_metadata(tuple(trailers))
    codes = {code.value[0]: code for code in grpc.StatusCode}
    context.abort(codes[status.code], status.message)


def _status(code: int, message: str, *details: Any) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(AnyMessage())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code, message=message, details=packed)


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def server(script: Script) -> Iterator[tuple[grpc.Server, str]]:
    """A server, and its address."""
    server = grpc.server(ThreadPoolExecutor(4))
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(Generation(script), server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(Model(), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield server, f"127.0.0.1:{port}"
    server.stop(0).wait(5)


@pytest.fixture
def target(server: tuple[grpc.Server, str]) -> str:
    return server[1]


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with Client(target, metadata=[("x-tenant", "a")]) as client:
        yield client


def test_events_come_typed_and_in_order(client: Client) -> None:
    generation = client.generate("Hi", timeout=10)
    events = list(generation)
    assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
    assert generation.started is events[0]
    assert generation.finished is events[-1]
    assert generation.finished.usage.output_tokens == 2


def test_pieces_are_the_text_without_gaps(client: Client) -> None:
    assert list(client.generate("Hi", timeout=10).pieces()) == ["Hel", "lo"]
    assert client.generate("Hi", timeout=10).text() == "Hello"


def test_metadata_goes_with_every_call(client: Client, script: Script) -> None:
    client.generate("Hi", timeout=10).text()
    assert script.metadata[0]["x-tenant"] == "a"


def test_request_carries_what_was_given_and_nothing_else(client: Client, script: Script) -> None:
    client.generate("Hi", temperature=0.0, seed=0, max_tokens=5, stop=["\n"], token_ids=True, model="m").text()
    client.generate("Hi", top_p=None).text()
    request, bare = script.requests
    assert bare == GenerateRequest(prompt=request.prompt)
    assert request.prompt.text == "Hi"
    assert request.model == "m"
    assert request.sampling.HasField("temperature")
    assert request.sampling.HasField("seed")
    assert not request.sampling.HasField("top_p")
    assert request.stopping.max_tokens == 5
    assert list(request.stopping.stop) == ["\n"]
    assert request.output.token_ids
    assert not request.output.HasField("text")


def test_unset_groups_stay_unset() -> None:
    request = build_request([1, 2], seed=1)
    assert list(request.prompt.token_ids.ids) == [1, 2]
    assert request.HasField("sampling")
    assert not request.HasField("stopping")
    assert not request.HasField("output")
    assert not request.HasField("cache")


def test_options_of_the_cache_are_set() -> None:
    request = build_request([1, 2], bypass_prefix_cache=True, cache_salt="mine")
    assert request.cache.bypass_prefix_cache
    assert request.cache.cache_salt == "mine"


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="temprature"):
        build_request("x", temprature=1)  # type: ignore[call-arg]


def test_option_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(TypeError):
        build_request("x", max_tokens="many")  # type: ignore[arg-type]


def test_chat_builds_messages(client: Client, script: Script) -> None:
    client.chat([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], enable_thinking=False).text()
    client.chat("just this").text()
    first, second = (request.prompt.chat for request in script.requests)
    assert [message.role for message in first.messages] == [Role.ROLE_SYSTEM, Role.ROLE_USER]
    assert first.HasField("enable_thinking")
    assert not first.enable_thinking
    assert second.messages[0].content == "just this"
    assert not second.HasField("enable_thinking")


def test_chat_proto_is_taken_as_it_is() -> None:
    chat = Chat(continue_final_message=True)
    assert build_request(chat).prompt.chat == chat


def test_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="system, user, assistant, tool, got 'robot'"):
        build_chat([{"role": "robot", "content": "x"}])


def test_a_value_that_the_contract_has_no_room_for_is_refused_by_name() -> None:
    for options in ({"seed": -1}, {"max_tokens": 2**31}, {"stop": ["\udcff"]}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
            build_request("x", **options)


def test_unary_calls(client: Client) -> None:
    tokens = client.tokenize("hi", timeout=10)
    assert list(tokens.token_ids) == [5, 6]
    assert client.detokenize([1, 2], timeout=10) == "1 2"
    assert client.model(timeout=10).name == "tiny"
    assert client.server_info(timeout=10).tensor_parallel_size == 2
    assert client.load(timeout=10).running == 7


def test_overload_is_tried_again_before_the_first_message(client: Client, script: Script) -> None:
    busy = _status(code_pb2.RESOURCE_EXHAUSTED, "queue full")
    script.refuse = [busy, busy]
    assert client.generate("Hi", timeout=10).text() == "Hello"
    assert len(script.requests) == 3


def test_persistent_overload_is_an_error_with_reason_and_delay(client: Client, script: Script) -> None:
    info = error_details_pb2.ErrorInfo(reason="QUEUE_FULL", domain="lightqwen")
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=1, nanos=500_000_000))
    script.refuse = [_status(code_pb2.RESOURCE_EXHAUSTED, "queue full", info, retry)] * 10
    with pytest.raises(LightqwenError) as caught:
        client.generate("Hi", timeout=10).text()
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.reason == "QUEUE_FULL"
    assert caught.value.retry_delay_s == pytest.approx(1.5)
    assert str(caught.value) == "RESOURCE_EXHAUSTED: queue full"
    assert len(script.requests) == 4


def test_a_server_that_goes_away_after_it_refused_is_an_error(
    server: tuple[grpc.Server, str], client: Client, script: Script
) -> None:
    """It drains: refuses, says when to try again, and is gone by then."""
    caught: list[LightqwenError] = []

    def ask() -> None:
        try:
            client.generate("Hi", timeout=5).text()
        except LightqwenError as error:
            caught.append(error)

    script.refuse = [_status(code_pb2.UNAVAILABLE, "draining")] * 10
    script.before_refusal = lambda: server[0].stop(1)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    assert not asking.is_alive(), "it waits for ever"
    assert caught[0].code is grpc.StatusCode.UNAVAILABLE


def test_invalid_request_names_the_field_and_is_not_tried_again(client: Client, script: Script) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="must be in (0, 1]")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    script.refuse = [_status(code_pb2.INVALID_ARGUMENT, "bad request", bad)] * 2
    with pytest.raises(LightqwenError) as caught:
        client.generate("Hi", timeout=10).text()
    assert caught.value.fields == {"sampling.top_p": "must be in (0, 1]"}
    assert caught.value.retry_delay_s is None
    assert len(script.requests) == 1


def test_failure_in_the_stream_keeps_what_came(client: Client, script: Script) -> None:
    script.fail_after_pieces = True
    pieces = []
    with pytest.raises(LightqwenError, match="INTERNAL: rank 1 is gone"):
        pieces.extend(client.generate("Hi", timeout=10).pieces())
    assert len(script.requests) == 1, "nothing is generated twice"


def test_timeout_is_a_deadline(client: Client, script: Script) -> None:
    script.endless = True
    with pytest.raises(LightqwenError) as caught:
        client.generate("Hi", timeout=0.5).text()
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert script.ended.wait(5)


def test_cancel_ends_iterating_quietly_and_the_call_on_the_server(client: Client, script: Script) -> None:
    script.endless = True
    generation = client.generate("Hi", timeout=30)
    pieces = []
    for piece in generation.pieces():
        pieces.append(piece)
        if piece == "lo":
            generation.cancel()
    assert pieces == ["Hel", "lo"]
    assert generation.finished is None
    assert script.ended.wait(5)


def test_leaving_the_block_cancels(client: Client, script: Script) -> None:
    script.endless = True
    with client.generate("Hi", timeout=30) as generation:
        assert next(generation.pieces()) == "Hel"
    assert script.ended.wait(5)


def test_nobody_there_is_unavailable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(LightqwenError) as caught:
        client.model(timeout=5)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    assert "\n" not in str(caught.value)


@pytest.fixture
async def async_client(target: str) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(target) as client:
        yield client


async def test_async_stream(async_client: AsyncClient) -> None:
    generation = async_client.chat("Hi", max_tokens=3, timeout=10)
    events = [event async for event in generation]
    assert [type(event) for event in events] == [Started, Delta, Delta, Delta, Finished]
    assert await async_client.generate("Hi", timeout=10).text() == "Hello"


async def test_async_unary(async_client: AsyncClient) -> None:
    assert (await async_client.model(timeout=10)).name == "tiny"
    assert (await async_client.server_info(timeout=10)).version == "9"
    assert (await async_client.load(timeout=10)).running == 7


async def test_async_error_has_details(async_client: AsyncClient, script: Script) -> None:
    info = error_details_pb2.ErrorInfo(reason="CONTEXT_LENGTH_EXCEEDED", domain="lightqwen")
    script.refuse = [_status(code_pb2.INVALID_ARGUMENT, "too long", info)]
    with pytest.raises(LightqwenError) as caught:
        await async_client.generate("Hi", timeout=10).text()
    assert caught.value.reason == "CONTEXT_LENGTH_EXCEEDED"


async def test_async_cancel(async_client: AsyncClient, script: Script) -> None:
    script.endless = True
    generation = async_client.generate("Hi", timeout=30)
    async with asyncio.timeout(10):
        async for _ in generation.pieces():
            generation.cancel()
    assert await asyncio.to_thread(script.ended.wait, 5)


BASE_ONLY = """
import importlib.abc, sys
ALLOWED = {"grpc", "google", "lightqwen", "typing_extensions", "service"}

class Gate(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        outside = top not in sys.stdlib_module_names and top not in ALLOWED
        if outside or name.startswith("google.rpc"):
            raise ModuleNotFoundError(f"not in the base installation: {name}", name=name)

sys.meta_path.insert(0, Gate())
"""


def test_base_installation_is_enough_for_the_client(target: str, script: Script) -> None:
    script.refuse = [_status(code_pb2.INVALID_ARGUMENT, "no")]
    code = f"""
from lightqwen.client import Client, LightqwenError
with Client({target!r}) as client:
    try:
        client.generate("x", timeout=10).text()
    except LightqwenError as error:
        print(error.code.name, repr(error.reason))
    print(client.generate("x", timeout=10).text())
"""
    done = subprocess.run([sys.executable, "-c", BASE_ONLY + code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["INVALID_ARGUMENT ''", "Hello"]
