# Made by protos/generate.py from lightqwen/v1/model.proto, sha256 b5ec9da0dab4e36a677361f7077f304acf4d07f198a4d75aebe2bd3dfe3b7341
from lightqwen.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Capability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CAPABILITY_UNSPECIFIED: _ClassVar[Capability]
    CAPABILITY_TOKEN_INPUT: _ClassVar[Capability]
    CAPABILITY_TEXT_INPUT: _ClassVar[Capability]
    CAPABILITY_CHAT_INPUT: _ClassVar[Capability]
    CAPABILITY_TEXT_OUTPUT: _ClassVar[Capability]
    CAPABILITY_STOP_STRINGS: _ClassVar[Capability]
    CAPABILITY_PREFIX_CACHE: _ClassVar[Capability]
    CAPABILITY_THINKING_SWITCH: _ClassVar[Capability]
    CAPABILITY_LOGPROBS: _ClassVar[Capability]
    CAPABILITY_PROMPT_LOGPROBS: _ClassVar[Capability]
    CAPABILITY_STRUCTURED_OUTPUT: _ClassVar[Capability]
    CAPABILITY_TOOL_CALLS: _ClassVar[Capability]
    CAPABILITY_REASONING_SPLIT: _ClassVar[Capability]
    CAPABILITY_ADAPTERS: _ClassVar[Capability]
    CAPABILITY_MULTIPLE_SEQUENCES: _ClassVar[Capability]
    CAPABILITY_PRIORITY: _ClassVar[Capability]
CAPABILITY_UNSPECIFIED: Capability
CAPABILITY_TOKEN_INPUT: Capability
CAPABILITY_TEXT_INPUT: Capability
CAPABILITY_CHAT_INPUT: Capability
CAPABILITY_TEXT_OUTPUT: Capability
CAPABILITY_STOP_STRINGS: Capability
CAPABILITY_PREFIX_CACHE: Capability
CAPABILITY_THINKING_SWITCH: Capability
CAPABILITY_LOGPROBS: Capability
CAPABILITY_PROMPT_LOGPROBS: Capability
CAPABILITY_STRUCTURED_OUTPUT: Capability
CAPABILITY_TOOL_CALLS: Capability
CAPABILITY_REASONING_SPLIT: Capability
CAPABILITY_ADAPTERS: Capability
CAPABILITY_MULTIPLE_SEQUENCES: Capability
CAPABILITY_PRIORITY: Capability

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("name", "revision", "context_length", "vocab_size", "eos_token_ids", "tokenizer_sha256", "default_sampling", "capabilities")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CAPABILITIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    context_length: int
    vocab_size: int
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    tokenizer_sha256: str
    default_sampling: _common_pb2.SamplingParameters
    capabilities: _containers.RepeatedScalarFieldContainer[Capability]
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., context_length: _Optional[int] = ..., vocab_size: _Optional[int] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., tokenizer_sha256: _Optional[str] = ..., default_sampling: _Optional[_Union[_common_pb2.SamplingParameters, _Mapping]] = ..., capabilities: _Optional[_Iterable[_Union[Capability, str]]] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "api_version", "instance_id", "tensor_parallel_size", "device", "dtype", "attention_backend", "kv_block_size", "kv_blocks_total", "max_running", "max_batched_tokens", "engine_epoch", "limits")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_SIZE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_BACKEND_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    version: str
    api_version: str
    instance_id: str
    tensor_parallel_size: int
    device: str
    dtype: str
    attention_backend: str
    kv_block_size: int
    kv_blocks_total: int
    max_running: int
    max_batched_tokens: int
    engine_epoch: int
    limits: Limits
    def __init__(self, version: _Optional[str] = ..., api_version: _Optional[str] = ..., instance_id: _Optional[str] = ..., tensor_parallel_size: _Optional[int] = ..., device: _Optional[str] = ..., dtype: _Optional[str] = ..., attention_backend: _Optional[str] = ..., kv_block_size: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., max_running: _Optional[int] = ..., max_batched_tokens: _Optional[int] = ..., engine_epoch: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_prompt_bytes", "max_stop_strings", "max_stop_string_bytes", "max_stop_token_ids", "max_chat_messages", "max_queued_requests", "max_queued_tokens", "max_receive_message_bytes")
    MAX_PROMPT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_CHAT_MESSAGES_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RECEIVE_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_prompt_bytes: int
    max_stop_strings: int
    max_stop_string_bytes: int
    max_stop_token_ids: int
    max_chat_messages: int
    max_queued_requests: int
    max_queued_tokens: int
    max_receive_message_bytes: int
    def __init__(self, max_prompt_bytes: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_stop_string_bytes: _Optional[int] = ..., max_stop_token_ids: _Optional[int] = ..., max_chat_messages: _Optional[int] = ..., max_queued_requests: _Optional[int] = ..., max_queued_tokens: _Optional[int] = ..., max_receive_message_bytes: _Optional[int] = ...) -> None: ...
