"""Between the contract's messages and the gateway's own types: the only module that reads or builds messages.

It refuses what is in the contract but does not work here (`_UNSUPPORTED`), what cannot be turned into a value, and
chats of so many parts that turning them into values would hold up the event loop; all other checks are `validation`'s.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value

from lightqwen.v1 import admin_pb2, common_pb2, generation_pb2, model_pb2
from service.checkpoint import ModelCard
from service.config import ServeConfig
from service.errors import InvalidRequestError, UnsupportedError, Violation
from service.requests import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    ResolvedRequest,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from service.streams import DeltaEvent, Event, FinishedEvent, Reply, StartedEvent
from service.tokenizing import Encoded
from worker.client import EngineState
from worker.control import MAX_NAMED_CALLS
from worker.messages import MAX_STOP_IDS, EngineInfo, EngineStats, FinishReason, SamplingParams

# Fields of a GenerateRequest that do not work yet, each with the value that asks for nothing (None: any value asks).
_UNSUPPORTED: Mapping[str, object] = {
    "prompt.chat.tools": None,
    "prompt.chat.tool_choice": None,
    "prompt.chat.thinking_token_budget": None,
    "prompt.chat.continue_final_message": False,
    "sampling.logit_bias": None,
    "sampling.allowed_token_ids": None,
    "sampling.num_sequences": 1,
    "stopping.time_budget": None,
    "output.split_reasoning": False,
    "output.logprobs": None,
    "output.candidate_token_ids": None,
    "output.prompt_logprobs": None,
    "output.prompt_logprobs_start": None,
    "output.echo": False,
    "output.max_chunk_delay": None,
    "output.max_chunk_tokens": None,
    "structured_output": None,
    "scheduling.priority": 0,
    "scheduling.queue_timeout": None,
    "adapter": None,
}

_UNSUPPORTED_IN_TOKENIZE: Mapping[str, object] = {
    field: neutral
    for field, neutral in _UNSUPPORTED.items()
    if field.startswith("prompt.") and field not in ("prompt.chat.tools", "prompt.chat.thinking_token_budget")
}

_UNSUPPORTED_WITHIN = frozenset(path[:end] for path in _UNSUPPORTED for end in range(len(path)) if path[end] == ".")
"""The messages that such fields lie in, one in the other."""

MAX_TEMPLATE_ARGUMENTS = 32
MAX_TEMPLATE_ARGUMENTS_BYTES = 64 * 2**10

_ABORTABLE = re.compile(r"[ -~]{0,128}")

_ROLES = {
    common_pb2.ROLE_SYSTEM: "system",
    common_pb2.ROLE_USER: "user",
    common_pb2.ROLE_ASSISTANT: "assistant",
    common_pb2.ROLE_TOOL: "tool",
}

_REASONS = {
    None: common_pb2.FINISH_REASON_STOP_STRING,
    FinishReason.EOS: common_pb2.FINISH_REASON_EOS,
    FinishReason.STOP_TOKEN: common_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.MAX_TOKENS: common_pb2.FINISH_REASON_MAX_TOKENS,
    FinishReason.CONTEXT_FULL: common_pb2.FINISH_REASON_CONTEXT_FULL,
    FinishReason.ABORTED: common_pb2.FINISH_REASON_ABORTED,
}

_STATES = {
    EngineState.STARTING: admin_pb2.ENGINE_STATE_STARTING,
    EngineState.READY: admin_pb2.ENGINE_STATE_READY,
    EngineState.RESTARTING: admin_pb2.ENGINE_STATE_RESTARTING,
    EngineState.DEAD: admin_pb2.ENGINE_STATE_DEAD,
}


# ---- requests --------------------------------------------------------------------------------------------------------


def generation_request(
    message: generation_pb2.GenerateRequest, config: ServeConfig, *, tenant: str = ""
) -> GenerationRequest:
    """Read a GenerateRequest of a tenant.

    Raises:
        UnsupportedError: it asks for something that does not work yet.
        InvalidRequestError: it has no prompt, a chat beyond the limits of `config`, or JSON in it that is none.
    """
    _refuse_unsupported(message, _UNSUPPORTED)
    output = message.output
    return GenerationRequest(
        request_id=message.request_id,
        model=message.model,
        prompt=prompt(message.prompt, config),
        sampling=_sampling(message.sampling),
        stopping=_stopping(message.stopping),
        text=output.text if output.HasField("text") else True,
        token_ids=output.token_ids,
        skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
        cache_salt=message.cache.cache_salt,
        use_prefix_cache=not message.cache.bypass_prefix_cache,
        tenant=tenant,
    )


def tokenize_request(message: generation_pb2.TokenizeRequest, config: ServeConfig) -> tuple[str, Prompt, bool]:
    """Model name, prompt, whether to add special tokens. Raises as `generation_request`."""
    _refuse_unsupported(message, _UNSUPPORTED_IN_TOKENIZE)
    add_special_tokens = message.add_special_tokens if message.HasField("add_special_tokens") else True
    return message.model, prompt(message.prompt, config), add_special_tokens


def detokenize_request(message: generation_pb2.DetokenizeRequest) -> tuple[str, np.ndarray, bool]:
    """Model name, ids, whether to skip special tokens."""
    return message.model, np.array(message.token_ids, dtype=np.int64), message.skip_special_tokens


def prompt(message: common_pb2.Prompt, config: ServeConfig) -> Prompt:
    kind = message.WhichOneof("kind")
    if kind == "text":
        return TextPrompt(message.text)
    if kind == "token_ids":
        return TokenPrompt(np.array(message.token_ids.ids, dtype=np.int64))
    if kind == "chat":
        _check_size(message.chat, config)
        return _chat(message.chat)
    raise InvalidRequestError([Violation("prompt", "is missing: give text, token_ids or chat")])


def _check_size(chat: common_pb2.Chat, config: ServeConfig) -> None:
    found: list[Violation] = []
    most = config.max_chat_messages
    if len(chat.messages) > most:
        found.append(Violation("prompt.chat.messages", f"has more than {most} messages"))
    elif sum(len(message.tool_calls) for message in chat.messages) > most:
        found.append(Violation("prompt.chat.messages", f"has more than {most} tool calls"))
    if len(chat.tools) > most:
        found.append(Violation("prompt.chat.tools", f"has more than {most} tools"))
    arguments = chat.template_arguments
    if len(arguments.fields) > MAX_TEMPLATE_ARGUMENTS or arguments.ByteSize() > MAX_TEMPLATE_ARGUMENTS_BYTES:
        allowed = f"{MAX_TEMPLATE_ARGUMENTS} entries or {MAX_TEMPLATE_ARGUMENTS_BYTES} bytes"
        found.append(Violation("prompt.chat.template_arguments", f"has more than {allowed}"))
    if chat.ByteSize() > config.max_prompt_bytes:
        found.append(Violation("prompt.chat", f"has more than {config.max_prompt_bytes} bytes"))
    if found:
        raise InvalidRequestError(found)


def _chat(message: common_pb2.Chat) -> ChatPrompt:
    return ChatPrompt(
        messages=tuple(_chat_message(m, f"prompt.chat.messages[{i}]") for i, m in enumerate(message.messages)),
        tools=tuple(_tool(tool, f"prompt.chat.tools[{i}]") for i, tool in enumerate(message.tools)),
        enable_thinking=message.enable_thinking if message.HasField("enable_thinking") else None,
        template_arguments=_struct(message.template_arguments),
        num_bytes=message.ByteSize(),
    )


def _chat_message(message: common_pb2.ChatMessage, path: str) -> dict[str, Any]:
    if message.role not in _ROLES:
        raise InvalidRequestError([Violation(f"{path}.role", "is missing or unknown")])
    result: dict[str, Any] = {"role": _ROLES[message.role], "content": message.content}
    if message.reasoning:
        result["reasoning_content"] = message.reasoning
    if message.tool_call_id:
        result["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        result["tool_calls"] = [
            _tool_call(call, f"{path}.tool_calls[{i}]") for i, call in enumerate(message.tool_calls)
        ]
    return result


def _tool_call(call: common_pb2.ToolCall, path: str) -> dict[str, Any]:
    arguments = _json_object(call.arguments_json, f"{path}.arguments_json")
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _tool(tool: common_pb2.Tool, path: str) -> dict[str, Any]:
    parameters = _json_object(tool.parameters_json_schema, f"{path}.parameters_json_schema")
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def _json_object(text: str, path: str) -> dict[str, Any]:
    """The object that the text spells; an empty text is an empty object."""
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InvalidRequestError([Violation(path, "is not a JSON object")])
    return value


def _struct(message: Struct) -> dict[str, Any]:
    return {name: _value(value) for name, value in message.fields.items()}


def _value(message: Value) -> Any:
    """Protobuf itself bounds the depth of what it parses to 100."""
    kind = message.WhichOneof("kind")
    if kind == "struct_value":
        return _struct(message.struct_value)
    if kind == "list_value":
        return [_value(value) for value in message.list_value.values]
    if kind == "number_value":
        number = message.number_value
        return int(number) if math.isfinite(number) and number.is_integer() else number
    return None if kind in (None, "null_value") else getattr(message, kind)


def _sampling(message: common_pb2.SamplingParameters) -> Sampling:
    return Sampling(**{name: _optional(message, name) for name in Sampling.__dataclass_fields__})


def _stopping(message: common_pb2.StoppingParameters) -> Stopping:
    return Stopping(
        max_tokens=_optional(message, "max_tokens"),
        min_tokens=message.min_tokens,
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        include_stop=message.include_stop,
        ignore_eos=message.ignore_eos,
    )


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _refuse_unsupported(message: Message, unsupported: Mapping[str, object], above: str = "") -> None:
    """`above`: the path of the message, with a dot at its end. Only what is set is looked at: most fields are not."""
    for field, value in message.ListFields():
        path = above + field.name
        if path in unsupported:
            neutral = unsupported[path]
            if neutral is None or value != neutral:
                raise UnsupportedError(path)
        elif path in _UNSUPPORTED_WITHIN:
            _refuse_unsupported(value, unsupported, f"{path}.")


# ---- answers ---------------------------------------------------------------------------------------------------------


def event(event: Event, request: ResolvedRequest, reply: Reply) -> generation_pb2.GenerateResponse:
    if isinstance(event, DeltaEvent):
        return generation_pb2.GenerateResponse(
            delta=generation_pb2.Delta(
                text=event.text, token_ids=event.token_ids, output_tokens_total=event.output_tokens_total
            )
        )
    if isinstance(event, StartedEvent):
        return generation_pb2.GenerateResponse(started=_started(event, request))
    return generation_pb2.GenerateResponse(finished=_finished(event, request, reply))


def _started(event: StartedEvent, request: ResolvedRequest) -> generation_pb2.Started:
    stopping = request.stopping
    return generation_pb2.Started(
        request_id=request.request_id,
        model=request.model,
        prompt_tokens=len(request.engine.prompt_ids),
        cached_tokens=event.cached_tokens,
        sampling=_sampling_message(request.engine.sampling),
        stopping=common_pb2.StoppingParameters(
            max_tokens=request.max_tokens,
            min_tokens=stopping.min_tokens,
            stop=stopping.stop,
            stop_token_ids=stopping.stop_token_ids,
            include_stop=stopping.include_stop,
            ignore_eos=stopping.ignore_eos,
        ),
    )


def _sampling_message(sampling: SamplingParams) -> common_pb2.SamplingParameters:
    return common_pb2.SamplingParameters(
        **{name: getattr(sampling, name) for name in SamplingParams.__struct_fields__}, num_sequences=1
    )


def _finished(event: FinishedEvent, request: ResolvedRequest, reply: Reply) -> generation_pb2.Finished:
    finished = generation_pb2.Finished(
        finish_reason=_REASONS[event.reason],
        usage=common_pb2.Usage(
            prompt_tokens=len(request.engine.prompt_ids),
            cached_tokens=reply.cached_tokens,
            output_tokens=reply.output_tokens,
        ),
        timings=common_pb2.Timings(
            queue=_duration(reply.scheduled - reply.arrived),
            prefill=_duration(reply.first_token - reply.scheduled),
            time_to_first_token=_duration(reply.first_token - reply.arrived),
            decode=_duration(reply.last_token - reply.first_token),
            total=_duration(reply.last_token - reply.arrived),
            preemptions=event.preemptions,
        ),
    )
    if event.matched_stop is not None:
        finished.matched_stop = event.matched_stop
    elif event.matched_token_id is not None:
        finished.matched_token_id = event.matched_token_id
    return finished


def tokenize_response(encoded: Encoded) -> generation_pb2.TokenizeResponse:
    ids = encoded.ids.tolist()
    return generation_pb2.TokenizeResponse(token_ids=ids, count=len(ids), rendered_prompt=encoded.text)


def detokenize_response(text: str) -> generation_pb2.DetokenizeResponse:
    return generation_pb2.DetokenizeResponse(text=text)


# ---- model -----------------------------------------------------------------------------------------------------------


def model_response(
    card: ModelCard,
    context_length: int,
    defaults: SamplingParams,
    *,
    has_tokenizer: bool,
    has_chat: bool,
    prefix_cache: bool,
) -> model_pb2.GetModelResponse:
    capabilities = [model_pb2.CAPABILITY_TOKEN_INPUT]
    if has_tokenizer:
        capabilities += [
            model_pb2.CAPABILITY_TEXT_INPUT,
            model_pb2.CAPABILITY_TEXT_OUTPUT,
            model_pb2.CAPABILITY_STOP_STRINGS,
        ]
    if has_chat:
        capabilities += [model_pb2.CAPABILITY_CHAT_INPUT, model_pb2.CAPABILITY_THINKING_SWITCH]
    if prefix_cache:
        capabilities.append(model_pb2.CAPABILITY_PREFIX_CACHE)
    default_sampling = _sampling_message(defaults)
    default_sampling.ClearField("seed")
    return model_pb2.GetModelResponse(
        name=card.name,
        revision=card.revision,
        context_length=context_length,
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_ids,
        tokenizer_sha256=card.tokenizer_sha256,
        default_sampling=default_sampling,
        capabilities=capabilities,
    )


def server_info_response(
    config: ServeConfig, info: EngineInfo, *, version: str, instance_id: str
) -> model_pb2.GetServerInfoResponse:
    return model_pb2.GetServerInfoResponse(
        version=version,
        api_version="lightqwen.v1",
        instance_id=instance_id,
        tensor_parallel_size=info.tensor_parallel_size,
        device=info.device,
        dtype=info.dtype,
        attention_backend=info.attention_backend,
        kv_block_size=info.block_size,
        kv_blocks_total=info.num_blocks,
        max_running=info.max_running,
        max_batched_tokens=info.max_batched_tokens,
        engine_epoch=info.epoch,
        limits=model_pb2.Limits(
            max_prompt_bytes=config.max_prompt_bytes,
            max_stop_strings=config.max_stop_strings,
            max_stop_string_bytes=config.max_stop_string_bytes,
            max_stop_token_ids=MAX_STOP_IDS,
            max_chat_messages=config.max_chat_messages,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            max_receive_message_bytes=config.max_receive_message_bytes,
        ),
    )


# ---- administration --------------------------------------------------------------------------------------------------


def load(
    stats: EngineStats,
    state: EngineState,
    *,
    draining: bool,
    streams: int,
    waiting: int,
    waiting_tokens: int,
    output_tokens_per_second: float,
) -> admin_pb2.Load:
    return admin_pb2.Load(
        engine_state=_STATES[state],
        draining=draining,
        streams=streams,
        running=stats.running,
        waiting=waiting,
        waiting_prompt_tokens=waiting_tokens,
        kv_blocks_used=stats.blocks_used,
        kv_blocks_cached=stats.blocks_cached,
        kv_blocks_total=stats.blocks_total,
        cache_hit_tokens=stats.prefix_hit_tokens,
        output_tokens_per_second=output_tokens_per_second,
    )


def get_load_response(load: admin_pb2.Load) -> admin_pb2.GetLoadResponse:
    return admin_pb2.GetLoadResponse(load=load)


def watch_load_response(load: admin_pb2.Load) -> admin_pb2.WatchLoadResponse:
    return admin_pb2.WatchLoadResponse(load=load)


def watch_interval_s(message: admin_pb2.WatchLoadRequest) -> float:
    """Raises InvalidRequestError for an interval below 0.05 s or above a day."""
    return _seconds(message, "interval", default=1.0, low=0.05, high=86400.0)


def abort_request(message: admin_pb2.AbortRequest) -> tuple[list[str], bool]:
    """Request ids, and whether everything is meant.

    Raises InvalidRequestError for ids that no call can have, and for more of them than a message between gateways is
    sure to hold (`worker.control.MAX_NAMED_CALLS`).
    """
    ids = list(message.request_ids)
    if len(ids) > MAX_NAMED_CALLS or any(not _ABORTABLE.fullmatch(request_id) for request_id in ids):
        told = f"takes at most {MAX_NAMED_CALLS} ids, each of up to 128 printable ASCII characters"
        raise InvalidRequestError([Violation("request_ids", told)])
    return ids, message.all


def abort_response(outcomes: Iterable[tuple[str, bool]]) -> admin_pb2.AbortResponse:
    return admin_pb2.AbortResponse(
        results=[
            admin_pb2.AbortResult(
                request_id=request_id,
                outcome=admin_pb2.ABORT_OUTCOME_ABORTED if found else admin_pb2.ABORT_OUTCOME_NOT_FOUND,
            )
            for request_id, found in outcomes
        ]
    )


def drain_wait_s(message: admin_pb2.DrainRequest) -> float:
    """Raises InvalidRequestError for a negative time or one above a day."""
    return _seconds(message, "wait", default=0.0, low=0.0, high=86400.0)


def drain_response(streams: int) -> admin_pb2.DrainResponse:
    return admin_pb2.DrainResponse(streams=streams)


def flush_response(blocks: int) -> admin_pb2.FlushCacheResponse:
    return admin_pb2.FlushCacheResponse(blocks=blocks)


def _seconds(message: Message, name: str, *, default: float, low: float, high: float) -> float:
    if not message.HasField(name):
        return default
    value: Duration = getattr(message, name)
    seconds = value.seconds + value.nanos / 1e9
    if not low <= seconds <= high:
        raise InvalidRequestError([Violation(name, f"must be within [{low:g}, {high:g}] seconds, got {seconds:g}")])
    return seconds


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(max(0, round(seconds * 1e9)))
    return duration
