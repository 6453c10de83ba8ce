"""A request on its way through the gateway, as frozen values: what a client asked, and what that resolves to.

None means that the client left it to the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worker.client import EngineRequest


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    ids: np.ndarray  # [n] int64


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """Messages and tools are plain dictionaries of the form that chat templates expect."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    enable_thinking: bool | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    num_bytes: int = 0  # of all text in it


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a client asked for."""

    request_id: str = ""
    model: str = ""
    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    text: bool = True
    token_ids: bool = False
    skip_special_tokens: bool = True
    cache_salt: str = ""
    use_prefix_cache: bool = True
    tenant: str = ""  # who asks, as the server knows them; nobody finds another's prompts in the prefix cache

    @property
    def needs_text(self) -> bool:
        return self.text or bool(self.stopping.stop)

    @property
    def engine_salt(self) -> bytes:
        """What keeps apart in the prefix cache: the tenant, then the tenant's own salt, which cannot hold a NUL."""
        return f"{self.tenant}\0{self.cache_salt}".encode() if self.tenant else self.cache_salt.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRequest:
    """What the engine is told, and what the stream of answers needs to know. Every value is final."""

    request_id: str
    model: str
    engine: EngineRequest
    max_tokens: int  # as echoed: never more than the context has room for, when the client left it open
    stopping: Stopping
    text: bool
    token_ids: bool
    skip_special_tokens: bool
    needs_text: bool
