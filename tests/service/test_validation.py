"""Whatever a client sends is a request that the engine can take, or an error that names a field; never a surprise."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightqwen.v1 import generation_pb2
from lightqwen.v1.common_pb2 import Chat, ChatMessage, Tool, ToolCall
from service import convert
from service.checkpoint import ModelCard
from service.config import ServeConfig
from service.errors import InvalidRequestError, ServeError, to_status
from service.requests import ResolvedRequest, Sampling, TokenPrompt
from service.validation import Rules
from worker.config import ConfigError
from worker.messages import MAX_STOP_IDS

CARD = ModelCard(name="m", vocab_size=100, context_length=64, eos_ids=(1, 2), defaults=Sampling(top_k=20))

WILD = {
    "enum": st.integers(0, 5),
    "key": st.text(max_size=5),
    "int32": st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 70),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1) | st.integers(0, 110),
    "uint64": st.integers(0, 2**64 - 1),
    "double": st.floats() | st.floats(-3, 3),
    "bool": st.booleans(),
    "string": st.text(max_size=20) | st.sampled_from(["m", "{}", "[", '{"a": [1]}']),
    "bytes": st.binary(max_size=5),
}
TAME = {
    "int32": st.integers(1, 8),
    "enum": st.integers(1, 4),
    "key": st.sampled_from(["a", "b"]),
    "int64": st.integers(0, 8),
    "uint32": st.integers(0, 60),
    "uint64": st.integers(0, 2**64 - 1),
    "double": st.sampled_from([0.5, 0.9, 1.0]),
    "bool": st.booleans(),
    "string": st.sampled_from(["m", "{}", "abc"]),
    "bytes": st.just(b""),
}
TYPES = {1: "double", 3: "int64", 4: "uint64", 5: "int32", 8: "bool", 9: "string", 12: "bytes", 13: "uint32"}


CONFIG = ServeConfig(max_prompt_bytes=200, max_chat_messages=3)


def rules(card: ModelCard = CARD) -> Rules:
    return Rules(CONFIG, card, has_tokenizer=True, has_chat_template=True, draw_seed=lambda: 7)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], values_of: dict[str, st.SearchStrategy[Any]] = WILD) -> Any:
    """Any message of this kind: each field set or not; wild ones to anything that its type can hold."""
    message: Any = kind()
    if isinstance(message, Struct):
        message.update(draw(st.dictionaries(values_of["key"], st.floats() | st.text(max_size=3), max_size=2)))
        return message
    for field in message.DESCRIPTOR.fields:
        if not draw(st.booleans()):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(message, field.name).update(
                draw(st.dictionaries(values_of["uint32"], values_of["double"], max_size=2))
            )
        elif field.message_type is not None:
            nested = messages(field.message_type._concrete_class, values_of)
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(nested, max_size=4)))
            else:
                getattr(message, field.name).CopyFrom(draw(nested))
        else:
            values = values_of["enum" if field.enum_type is not None else TYPES[field.type]]
            if field.is_repeated:
                getattr(message, field.name).extend(draw(st.lists(values, max_size=5 if values_of is TAME else 40)))
            else:
                setattr(message, field.name, draw(values))
    return message


def drop_unsupported(message: Any) -> None:
    """Otherwise nearly every random request would be refused at the first look; as it would without a prompt."""
    if message.prompt.WhichOneof("kind") is None:
        message.prompt.text = "a prompt"
    for path in convert._UNSUPPORTED:
        *parents, name = path.split(".")
        owner = message
        for parent in parents:
            owner = getattr(owner, parent) if owner.HasField(parent) else None
            if owner is None:
                break
        else:
            owner.ClearField(name)


def resolve(message: generation_pb2.GenerateRequest, prompt_tokens: int) -> ResolvedRequest | ServeError:
    """What Generate does with a message before it goes to the engine; a text counts as so many tokens."""
    try:
        request = convert.generation_request(message, CONFIG)
        rules().check(request)
        ids = request.prompt.ids if isinstance(request.prompt, TokenPrompt) else range(prompt_tokens)
        return rules().resolve(request, "id", ids, CARD.context_length)
    except ServeError as error:
        return error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    messages(generation_pb2.GenerateRequest) | messages(generation_pb2.GenerateRequest, TAME),
    st.booleans(),
    st.integers(0, 70),
)
def test_any_request_is_sound_or_refused_by_name(message: Any, supported: bool, prompt_tokens: int) -> None:
    if supported:
        drop_unsupported(message)
    message = type(message).FromString(message.SerializeToString())
    resolved = resolve(message, prompt_tokens)
    if isinstance(resolved, ServeError):
        assert resolved.code.name in ("INVALID_ARGUMENT", "UNIMPLEMENTED", "NOT_FOUND")
        assert to_status(resolved).details
        return
    engine, sampling = resolved.engine, resolved.engine.sampling
    assert 0 < len(engine.prompt_ids) < CARD.context_length
    assert 0 <= engine.min_tokens <= engine.max_tokens
    assert len({*engine.eos_ids, *engine.stop_ids}) <= MAX_STOP_IDS
    assert all(0 <= token < CARD.vocab_size for token in (*engine.stop_ids, *engine.eos_ids))
    numbers = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty)
    assert all(math.isfinite(number) for number in numbers)
    assert sampling.temperature == 0 or sampling.temperature >= 0.001
    assert 0 < sampling.top_p <= 1
    assert sampling.top_k >= 0
    assert sampling.repetition_penalty > 0
    assert 0 <= sampling.seed < 2**64


CHAT = {
    "messages": (Chat(messages=[ChatMessage()] * 500_000), "prompt.chat.messages"),
    "tool calls": (Chat(messages=[ChatMessage(tool_calls=[ToolCall()] * 500_000)]), "prompt.chat.messages"),
    "tools": (Chat(messages=[ChatMessage(role=2)], tools=[Tool()] * 500_000), "prompt.chat.tools"),
    "template arguments": (
        Chat(messages=[ChatMessage(role=2)], template_arguments={"a": [0.5] * 200_000}),
        "prompt.chat.template_arguments",
    ),
}


@pytest.mark.parametrize(("chat", "field"), CHAT.values(), ids=CHAT.keys())
def test_what_has_far_too_many_parts_is_refused_before_they_are_looked_at(chat: Chat, field: str) -> None:
    """The event loop does it: a second spent here is a second in which no stream gets a token."""
    message = generation_pb2.TokenizeRequest(prompt={"chat": chat})
    began = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        convert.tokenize_request(message, ServeConfig())
    assert time.process_time() - began < 0.1
    assert [violation.field for violation in caught.value.violations] == [field]


def test_the_order_of_defaults() -> None:
    resolved = rules().resolve_sampling(Sampling(top_p=0.5))
    assert (resolved.top_p, resolved.top_k, resolved.temperature, resolved.seed) == (0.5, 20, 1.0, 7)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({"defaults": Sampling(top_p=3)}, r"generation_config\.json: top_p must be within \(0, 1\], got 3"),
        ({"eos_ids": (100,)}, "outside the checkpoint's vocabulary of 100"),
        ({"eos_ids": tuple(range(40))}, "more than 32 end-of-sequence ids"),
    ],
)
def test_a_checkpoint_with_impossible_defaults_is_refused_at_the_start(card: dict[str, Any], says: str) -> None:
    import dataclasses

    with pytest.raises(ConfigError, match=says):
        rules(dataclasses.replace(CARD, **card))
