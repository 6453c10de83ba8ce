"""Every error of the contract, as a client sees it."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lightqwen.v1 import common_pb2, generation_pb2
from tests.service.conftest import Serve, Served, collect, eventually, generate_request, ids
from tests.service.fake_leader import MAX_MODEL_LEN, VOCAB_SIZE
from worker.messages import FinishReason

GENERATE = "/lightqwen.v1.GenerationService/Generate"


class Failure:
    """A failed call's status with its details unpacked."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        status = rpc_status.from_call(error)
        assert status is not None, f"no details: {error}"
        self.info = error_details_pb2.ErrorInfo()
        self.bad_request = error_details_pb2.BadRequest()
        self.retry = error_details_pb2.RetryInfo()
        self.has_retry = False
        for detail in status.details:
            for target in (self.info, self.bad_request, self.retry):
                if detail.Unpack(target):
                    self.has_retry |= target is self.retry
        assert self.info.domain == "lightqwen"
        self.pushback = dict(error.trailing_metadata() or ()).get("grpc-retry-pushback-ms")

    @property
    def fields(self) -> list[str]:
        return [violation.field for violation in self.bad_request.field_violations]


async def failure(call: Any) -> Failure:
    """Read a call, of one answer or a stream of them, to the error that it must end with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (exhaust(call) if hasattr(call, "__aiter__") else call)
    return Failure(caught.value)


async def failure_by_reading(call: Any) -> Failure:
    """As `failure`, for a stream of which something was `read` before; gRPC allows one style only."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exhaust_by_reading(call)
    return Failure(caught.value)


async def exhaust(call: Any) -> None:
    async for _ in call:
        pass


async def exhaust_by_reading(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


def request(prompt: common_pb2.Prompt | None = None, **fields: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt or ids(1, 2), **fields)


def chat(**fields: Any) -> common_pb2.Prompt:
    return common_pb2.Prompt(chat=common_pb2.Chat(**fields))


USER = common_pb2.ChatMessage(role=common_pb2.ROLE_USER, content="hi")

INVALID = {
    "no prompt": (generation_pb2.GenerateRequest(), "prompt"),
    "empty text": (request(common_pb2.Prompt(text="")), "prompt.text"),
    "empty ids": (request(common_pb2.Prompt(token_ids={})), "prompt.token_ids.ids"),
    "empty chat": (request(chat()), "prompt.chat.messages"),
    "id": (request(ids(1, VOCAB_SIZE)), "prompt.token_ids.ids[1]"),
    "huge id": (request(ids(2**32 - 1)), "prompt.token_ids.ids[0]"),
    "role": (request(chat(messages=[{"content": "x"}])), "prompt.chat.messages[0].role"),
    "unknown role": (request(chat(messages=[{"role": 77, "content": "x"}])), "prompt.chat.messages[0].role"),
    "call": (
        request(chat(messages=[{"role": 3, "tool_calls": [{"name": "f", "arguments_json": "[1"}]}])),
        "prompt.chat.messages[0].tool_calls[0].arguments_json",
    ),
    "template argument": (
        request(chat(messages=[USER], template_arguments={"messages": "mine"})),
        "prompt.chat.template_arguments",
    ),
    "temperature NaN": (request(sampling={"temperature": math.nan}), "sampling.temperature"),
    "temperature inf": (request(sampling={"temperature": math.inf}), "sampling.temperature"),
    "temperature negative": (request(sampling={"temperature": -1}), "sampling.temperature"),
    "temperature tiny": (request(sampling={"temperature": 1e-30}), "sampling.temperature"),
    "top_p 0": (request(sampling={"top_p": 0}), "sampling.top_p"),
    "top_p NaN": (request(sampling={"top_p": math.nan}), "sampling.top_p"),
    "top_k": (request(sampling={"top_k": -1}), "sampling.top_k"),
    "min_p": (request(sampling={"min_p": 1.5}), "sampling.min_p"),
    "presence": (request(sampling={"presence_penalty": 2.1}), "sampling.presence_penalty"),
    "frequency": (request(sampling={"frequency_penalty": -math.inf}), "sampling.frequency_penalty"),
    "repetition": (request(sampling={"repetition_penalty": 0}), "sampling.repetition_penalty"),
    "max_tokens": (request(stopping={"max_tokens": 0}), "stopping.max_tokens"),
    "min_tokens": (request(stopping={"min_tokens": -1}), "stopping.min_tokens"),
    "min over max": (request(stopping={"min_tokens": 5, "max_tokens": 4}), "stopping.min_tokens"),
    "min over context": (request(stopping={"min_tokens": MAX_MODEL_LEN}), "stopping.min_tokens"),
    "stop empty": (request(stopping={"stop": ["a", ""]}), "stopping.stop[1]"),
    "stop long": (request(stopping={"stop": ["a" * 300]}), "stopping.stop[0]"),
    "stop many": (request(stopping={"stop": [str(i) for i in range(17)]}), "stopping.stop"),
    "stop id": (request(stopping={"stop_token_ids": [1, VOCAB_SIZE]}), "stopping.stop_token_ids[1]"),
    "stop ids many": (request(stopping={"stop_token_ids": range(200, 300)}), "stopping.stop_token_ids"),
    "stop ids many of one": (request(stopping={"stop_token_ids": [1] * 100}), "stopping.stop_token_ids"),
    "request id": (request(request_id="a\nb"), "request_id"),
    "request id long": (request(request_id="a" * 129), "request_id"),
    "salt": (request(cache={"cache_salt": "ż"}), "cache.cache_salt"),
}


@pytest.mark.parametrize("case", INVALID)
async def test_a_wrong_field_is_named_and_the_engine_hears_nothing(served: Served, case: str) -> None:
    message, field = INVALID[case]
    failed = await failure(served.generation.Generate(message))
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.fields == [field]
    assert field in failed.message
    assert served.leader.submits == []
    await eventually(lambda: len(served.gateway._calls) == 0)


async def test_every_wrong_field_is_named_at_once(served: Served) -> None:
    wrong = request(ids(VOCAB_SIZE), sampling={"top_p": 7, "min_p": -1}, stopping={"max_tokens": -3})
    failed = await failure(served.generation.Generate(wrong))
    assert failed.fields == ["prompt.token_ids.ids[0]", "sampling.top_p", "sampling.min_p", "stopping.max_tokens"]


UNSUPPORTED: dict[str, generation_pb2.GenerateRequest] = {
    "prompt.chat.tools": request(chat(messages=[USER], tools=[{"name": "f"}])),
    "prompt.chat.tool_choice": request(chat(messages=[USER], tool_choice={"mode": 1})),
    "prompt.chat.thinking_token_budget": request(chat(messages=[USER], thinking_token_budget=0)),
    "prompt.chat.continue_final_message": request(chat(messages=[USER], continue_final_message=True)),
    "sampling.logit_bias": request(sampling={"logit_bias": {1: 0.0}}),
    "sampling.allowed_token_ids": request(sampling={"allowed_token_ids": [1]}),
    "sampling.num_sequences": request(sampling={"num_sequences": 2}),
    "stopping.time_budget": request(stopping={"time_budget": {"seconds": 1}}),
    "output.split_reasoning": request(output={"split_reasoning": True}),
    "output.logprobs": request(output={"logprobs": 0}),
    "output.candidate_token_ids": request(output={"candidate_token_ids": [1]}),
    "output.prompt_logprobs": request(output={"prompt_logprobs": 1}),
    "output.prompt_logprobs_start": request(output={"prompt_logprobs_start": 0}),
    "output.echo": request(output={"echo": True}),
    "output.max_chunk_delay": request(output={"max_chunk_delay": {"seconds": 1}}),
    "output.max_chunk_tokens": request(output={"max_chunk_tokens": 1}),
    "structured_output": request(structured_output={"json_object": True}),
    "scheduling.priority": request(scheduling={"priority": 1}),
    "scheduling.queue_timeout": request(scheduling={"queue_timeout": {"seconds": 1}}),
    "adapter": request(adapter="mine"),
}


@pytest.mark.parametrize("field", UNSUPPORTED)
async def test_what_does_not_work_yet_is_refused_by_name(served: Served, field: str) -> None:
    failed = await failure(served.generation.Generate(UNSUPPORTED[field]))
    assert failed.code is grpc.StatusCode.UNIMPLEMENTED
    assert (failed.info.reason, failed.info.metadata["field"]) == ("UNSUPPORTED_FIELD", field)


async def test_asking_for_nothing_of_it_is_fine(served: Served) -> None:
    neutral = request(
        chat(messages=[USER], continue_final_message=False),
        sampling={"num_sequences": 1},
        output={"echo": False, "split_reasoning": False},
        scheduling={"priority": 0},
        stopping={"max_tokens": 2},
    )
    assert (await collect(served.generation.Generate(neutral))).finished.usage.output_tokens == 2


def _leaves(message: Message, path: str = "") -> set[str]:
    """The paths of every field of a request's messages, down to where a field is a value."""
    found = set()
    for field in message.DESCRIPTOR.fields:
        name = f"{path}{field.name}"
        nested = field.message_type
        if nested is None or field.is_repeated or not nested.full_name.startswith("lightqwen."):
            found.add(name)
        else:
            found |= _leaves(getattr(message, field.name), f"{name}.")
    return found


def test_every_field_of_the_contract_is_either_read_or_refused() -> None:
    """Whoever adds a field has to decide; nothing is silently ignored."""
    read = {
        *("request_id", "model", "prompt.text", "prompt.token_ids.ids", "prompt.chat.messages"),
        *("prompt.chat.enable_thinking", "prompt.chat.template_arguments"),
        *(f"sampling.{name}" for name in ("temperature", "top_p", "top_k", "min_p", "seed")),
        *(f"sampling.{name}_penalty" for name in ("presence", "frequency", "repetition")),
        *(f"stopping.{name}" for name in ("max_tokens", "min_tokens", "stop", "stop_token_ids")),
        *("stopping.include_stop", "stopping.ignore_eos"),
        *("output.text", "output.token_ids", "output.skip_special_tokens"),
        *("cache.cache_salt", "cache.bypass_prefix_cache"),
    }
    leaves = _leaves(generation_pb2.GenerateRequest())
    refused = {leaf for leaf in leaves for field in UNSUPPORTED if leaf == field or leaf.startswith(f"{field}.")}
    assert read | refused == leaves
    assert not read & refused


async def test_a_prompt_that_fills_the_context_tells_the_limit(served: Served) -> None:
    failed = await failure(served.generation.Generate(request(ids(*[1] * MAX_MODEL_LEN))))
    assert failed.code is grpc.StatusCode.INVALID_ARGUMENT
    assert failed.info.reason == "CONTEXT_LENGTH_EXCEEDED"
    assert dict(failed.info.metadata) == {"limit": str(MAX_MODEL_LEN), "given": str(MAX_MODEL_LEN)}


async def test_a_prompt_of_too_many_bytes_is_refused_before_it_is_tokenized(serve: Serve) -> None:
    async with serve(max_prompt_bytes=10, max_chat_messages=2) as served:
        failed = await failure(served.generation.Generate(request(common_pb2.Prompt(text="ż" * 6))))
        assert failed.fields == ["prompt.text"]
        failed = await failure(served.generation.Generate(request(chat(messages=[USER] * 3))))
        assert failed.fields == ["prompt.chat.messages", "prompt.chat"]
        failed = await failure(served.generation.Generate(request(ids(1, 2, 3))))
        assert failed.fields == ["prompt.token_ids.ids"]
        failed = await failure(
            served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[VOCAB_SIZE] * 3))
        )
        assert failed.fields == ["token_ids"]


async def test_a_message_over_the_limit_is_refused(serve: Serve) -> None:
    async with serve(max_receive_message_bytes=4096) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(served.generation.Generate(request(common_pb2.Prompt(text="x" * 5000))))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x02\xff\xfe"], ids=["not protobuf", "not UTF-8"])
async def test_a_malformed_message_is_the_clients_fault(served: Served, data: bytes) -> None:
    failed = await failure(served.channel.unary_stream(GENERATE)(data))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED")


async def test_another_model_is_not_found(served: Served) -> None:
    failed = await failure(served.generation.Generate(request(model="gpt-2")))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert failed.info.metadata["served"] == "tiny"
    await collect(served.generation.Generate(request(model="tiny", stopping={"max_tokens": 1})))


async def test_a_request_id_in_flight_is_refused_and_free_again_afterwards(served: Served) -> None:
    served.leader.hold = True
    first = served.generation.Generate(generate_request(ids(1), request_id="same", max_tokens=3))
    await eventually(lambda: len(served.leader.submits) == 1)
    failed = await failure(served.generation.Generate(generate_request(ids(1), request_id="same")))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_IN_USE")
    served.leader.hold = False
    assert len((await collect(first)).ids) == 3
    await collect(served.generation.Generate(generate_request(ids(1), request_id="same")))


async def test_overload_is_refused_with_a_hint_and_the_queue_empties(serve: Serve) -> None:
    async with serve(max_queued_requests=2) as served:
        served.leader.hold = True
        waiting = [served.generation.Generate(generate_request(ids(1), max_tokens=2)) for _ in range(2)]
        await eventually(lambda: len(served.leader.submits) == 2)
        failed = await failure(served.generation.Generate(generate_request(ids(1))))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert failed.retry.retry_delay.ToMilliseconds() == int(failed.pushback or 0) > 0
        assert served.metric("admission_rejections_total", reason="QUEUE_FULL") == 1
        served.leader.hold = False
        await asyncio.gather(*(collect(call) for call in waiting))
        await collect(served.generation.Generate(generate_request(ids(1))))


async def test_a_burst_beyond_all_limits_is_refused_readably(serve: Serve) -> None:
    """gRPC on its own would cancel some of what comes faster than it is taken up, at random and without a reason."""
    async with serve(max_queued_requests=8) as served:
        served.leader.hold = True
        burst = [asyncio.create_task(failure(served.generation.Generate(request()))) for _ in range(2500)]
        await eventually(lambda: sum(task.done() for task in burst) == 2500 - 8, 20)
        reasons = {task.result().info.reason for task in burst if task.done()}
        assert reasons == {"QUEUE_FULL"}
        for task in burst:
            task.cancel()
        await asyncio.gather(*burst, return_exceptions=True)


async def test_prompt_tokens_that_wait_are_limited_too(serve: Serve) -> None:
    async with serve(max_queued_tokens=100) as served:
        served.leader.hold = True
        first = served.generation.Generate(generate_request(ids(*[1] * 200), max_tokens=2))  # alone it may be longer
        await eventually(lambda: len(served.leader.submits) == 1)
        failed = await failure(served.generation.Generate(generate_request("a text of some length")))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_TOKENS_FULL")
        first.cancel()
        await eventually(lambda: served.gateway._admission.waiting_tokens == 0)
        served.leader.hold = False
        await collect(served.generation.Generate(generate_request("a text of some length")))


async def test_open_streams_are_limited(serve: Serve) -> None:
    async with serve(max_streams=1) as served:
        call = served.generation.Generate(generate_request(ids(1), max_tokens=200))
        await call.read()
        failed = await failure(served.generation.Generate(generate_request(ids(1))))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAMS_FULL")
        call.cancel()


async def test_without_a_tokenizer_text_is_a_failed_precondition(serve: Serve, bare_checkpoint: Path) -> None:
    async with serve(model=str(bare_checkpoint)) as served:
        only_ids = {"text": False, "token_ids": True}
        for wrong, field in (
            (request(common_pb2.Prompt(text="x"), output=only_ids), "prompt"),
            (request(output=only_ids, stopping={"stop": ["x"]}), "stopping.stop"),
            (request(), "output.text"),
        ):
            failed = await failure(served.generation.Generate(wrong))
            assert (failed.code, failed.info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "TOKENIZER_MISSING")
            assert failed.info.metadata["field"] == field


async def test_while_the_engine_restarts_it_is_unavailable_and_worth_a_retry(served: Served) -> None:
    served.gateway._engine.engine_lost(1, "it died")
    failed = await failure(served.generation.Generate(generate_request("text")))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTING")
    assert failed.has_retry
    assert served.metric("admission_rejections_total", reason="ENGINE_RESTARTING") == 1
    assert served.gateway._admission.streams == 0


@pytest.mark.parametrize(
    ("reason", "code", "named"),
    [
        (FinishReason.BROKEN, grpc.StatusCode.INTERNAL, "WORKER_FAILED"),
        (FinishReason.REJECTED, grpc.StatusCode.INVALID_ARGUMENT, "ENGINE_REJECTED"),
    ],
)
async def test_an_end_that_is_a_failure_is_a_status(
    served: Served, reason: FinishReason, code: grpc.StatusCode, named: str
) -> None:
    served.leader.end_with = reason
    failed = await failure(served.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (code, named)


async def test_the_engines_door_refuses_one_request_only(served: Served) -> None:
    good = served.generation.Generate(generate_request(ids(1), max_tokens=100))
    await eventually(lambda: len(served.leader.submits) == 1)
    served.leader.reject = "no"
    failed = await failure(served.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ENGINE_REJECTED")
    assert (await collect(good)).finished.usage.output_tokens == 100


async def test_nothing_of_an_unexpected_error_reaches_the_client(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*args: object) -> None:
        raise RuntimeError("secret path /etc/shadow")

    monkeypatch.setattr(served.gateway._engine, "submit", explode)
    failed = await failure(served.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in failed.message
    assert "secret path" in caplog.text
    assert served.gateway._admission.streams == 0
