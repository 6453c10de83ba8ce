"""Checks of what a client asked: all of them, before any work is done for it; and how what it left open is resolved.

Order: what the request says of itself (`Rules.check`), then, once the prompt's length is known, whether it fits
(`Rules.resolve`). The engine's door checks once more what could break a step.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from service.checkpoint import ModelCard
from service.config import ServeConfig
from service.errors import InvalidRequestError, ModelNotFoundError, PreconditionError, Violation
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
from worker.client import EngineRequest
from worker.config import ConfigError
from worker.messages import MAX_STOP_IDS, SamplingParams

REQUEST_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}")
CACHE_SALT = re.compile(r"[ -~]{1,128}")
TEMPLATE_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
RESERVED_TEMPLATE_ARGUMENTS = frozenset({"messages", "tools", "add_generation_prompt", "enable_thinking", "documents"})
BYTES_PER_ID = 4

_NEUTRAL = SamplingParams()


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    low_excluded: bool = False
    also: float | None = None  # one more value that is allowed

    def __contains__(self, value: float) -> bool:
        if value == self.also:
            return True
        above = value > self.low if self.low_excluded else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        text = f"within {'(' if self.low_excluded else '['}{self.low:g}, {self.high:g}]"
        return text if self.also is None else f"{self.also:g} or {text}"


_RANGES = {
    "temperature": _Range(0.001, 100, also=0),
    "top_p": _Range(0, 1, low_excluded=True),
    "top_k": _Range(0, 2**31 - 1),
    "min_p": _Range(0, 1),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "repetition_penalty": _Range(0.01, 10),
}


class Rules:
    """What this server accepts for this model."""

    def __init__(
        self,
        config: ServeConfig,
        card: ModelCard,
        *,
        has_tokenizer: bool,
        has_chat_template: bool,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(64),
    ) -> None:
        if wrong := _check_sampling(card.defaults):
            problems = "; ".join(f"{v.field.removeprefix('sampling.')} {v.description}" for v in wrong)
            raise ConfigError(f"generation_config.json: {problems}")
        if len(card.eos_ids) > MAX_STOP_IDS:
            raise ConfigError(f"the checkpoint has more than {MAX_STOP_IDS} end-of-sequence ids")
        if any(token >= card.vocab_size for token in card.eos_ids):
            raise ConfigError(
                f"eos_token_id {card.eos_ids} is outside the checkpoint's vocabulary of {card.vocab_size}"
            )
        self._config = config
        self._card = card
        self._has_tokenizer = has_tokenizer
        self._has_chat_template = has_chat_template
        self._draw_seed = draw_seed

    def check(self, request: GenerationRequest) -> None:
        """Refuse what can be refused without knowing the prompt's length.

        Raises:
            ServeError: InvalidRequestError names every wrong field.
        """
        self.check_model(request.model)
        found: list[Violation] = []
        if request.request_id and not REQUEST_ID.fullmatch(request.request_id):
            found.append(Violation("request_id", "must be 1 to 128 letters, digits or any of - _ . : /"))
        if request.cache_salt and not CACHE_SALT.fullmatch(request.cache_salt):
            found.append(Violation("cache.cache_salt", "must be 1 to 128 printable ASCII characters"))
        found += self._check_prompt(request.prompt)
        found += _check_sampling(request.sampling)
        found += self._check_stopping(request.stopping)
        if found:
            raise InvalidRequestError(found)
        self._check_tokenizer(request)

    def check_model(self, name: str) -> None:
        if name and name != self._card.name:
            raise ModelNotFoundError(name[:256], self._card.name)

    def check_prompt(self, prompt: Prompt) -> None:
        """As `check`, for a prompt alone."""
        if found := self._check_prompt(prompt):
            raise InvalidRequestError(found)
        self._check_prompt_tokenizer(prompt)

    def check_ids(self, ids: np.ndarray, field: str) -> None:
        """Refuse ids outside the vocabulary, and more of them than `max_prompt_bytes` can hold."""
        if found := self._check_ids(ids, field):
            raise InvalidRequestError(found)

    def require_tokenizer(self, field: str, remedy: str = "send token ids instead") -> None:
        if not self._has_tokenizer:
            raise PreconditionError(
                f"the checkpoint has no tokenizer; {remedy}", reason="TOKENIZER_MISSING", field=field
            )

    def resolve(
        self, request: GenerationRequest, request_id: str, prompt_ids: Sequence[int] | np.ndarray, context_length: int
    ) -> ResolvedRequest:
        """Fill in what the client left open.

        Raises:
            InvalidRequestError: the prompt, or prompt and min_tokens together, do not fit the context.
        """
        self.check_length(len(prompt_ids), context_length)
        room = context_length - len(prompt_ids)
        stopping = request.stopping
        # A client that names no limit gets the engine's: the sequence then ends with CONTEXT_FULL, not MAX_TOKENS.
        limit = stopping.max_tokens if stopping.max_tokens is not None else self._card.default_max_tokens
        at_most = room if limit is None else min(room, limit)
        if stopping.min_tokens > at_most:
            raise InvalidRequestError(
                [Violation("stopping.min_tokens", f"{stopping.min_tokens}, but at most {at_most} can be made")]
            )
        return ResolvedRequest(
            request_id=request_id,
            model=self._card.name,
            engine=EngineRequest(
                prompt_ids=prompt_ids,
                sampling=self.resolve_sampling(request.sampling),
                max_tokens=context_length if limit is None else limit,
                min_tokens=stopping.min_tokens,
                eos_ids=() if stopping.ignore_eos else self._card.eos_ids,
                stop_ids=tuple(dict.fromkeys(stopping.stop_token_ids)),
                cache_salt=request.engine_salt,
                use_prefix_cache=request.use_prefix_cache,
            ),
            max_tokens=room if limit is None else limit,
            stopping=stopping,
            text=request.text,
            token_ids=request.token_ids,
            skip_special_tokens=request.skip_special_tokens,
            needs_text=request.needs_text,
        )

    def check_length(self, prompt_tokens: int, context_length: int) -> None:
        if prompt_tokens == 0:
            raise InvalidRequestError([Violation("prompt", "is empty")])
        if prompt_tokens >= context_length:
            found = Violation("prompt", f"has {prompt_tokens} tokens; the context of {context_length} leaves no room")
            given = {"limit": str(context_length), "given": str(prompt_tokens)}
            raise InvalidRequestError([found], reason="CONTEXT_LENGTH_EXCEEDED", metadata=given)

    def resolve_sampling(self, asked: Sampling) -> SamplingParams:
        """The request's value, else the checkpoint's, else the neutral one; a drawn seed."""
        values: dict[str, Any] = {
            name: _first(getattr(asked, name), getattr(self._card.defaults, name), getattr(_NEUTRAL, name))
            for name in _RANGES
        }
        seed = self._draw_seed() if asked.seed is None else asked.seed
        return SamplingParams(**values, seed=seed)

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _check_prompt(self, prompt: Prompt) -> list[Violation]:
        if isinstance(prompt, TokenPrompt):
            return self._check_ids(prompt.ids, "prompt.token_ids.ids")
        if isinstance(prompt, TextPrompt):
            return self._check_bytes("prompt.text", len(prompt.text.encode()))
        return self._check_chat(prompt)

    def _check_chat(self, chat: ChatPrompt) -> list[Violation]:
        found: list[Violation] = []
        if not chat.messages:
            found.append(Violation("prompt.chat.messages", "is empty"))
        for name in chat.template_arguments:
            if name in RESERVED_TEMPLATE_ARGUMENTS or not TEMPLATE_ARGUMENT.fullmatch(name):
                found.append(
                    Violation("prompt.chat.template_arguments", f"{name[:64]!r} is not a name that can be set")
                )
        return found

    def _check_bytes(self, field: str, num_bytes: int) -> list[Violation]:
        if num_bytes == 0:
            return [Violation(field, "is empty")]
        if num_bytes > self._config.max_prompt_bytes:
            return [Violation(field, f"has {num_bytes} bytes, at most {self._config.max_prompt_bytes} are taken")]
        return []

    def _check_ids(self, ids: np.ndarray, field: str) -> list[Violation]:
        if len(ids) == 0:
            return [Violation(field, "is empty")]
        most = self._config.max_prompt_bytes // BYTES_PER_ID
        if len(ids) > most:
            return [Violation(field, f"has {len(ids)} ids, at most {most} are taken")]
        wrong = np.flatnonzero(ids >= self._card.vocab_size)
        if len(wrong):
            where = int(wrong[0])
            return [
                Violation(f"{field}[{where}]", f"{ids[where]} is outside the vocabulary of {self._card.vocab_size}")
            ]
        return []

    def _check_stopping(self, stopping: Stopping) -> list[Violation]:
        found: list[Violation] = []
        lowest, highest = stopping.min_tokens, stopping.max_tokens
        if highest is not None and highest < 1:
            found.append(Violation("stopping.max_tokens", f"must be at least 1, got {highest}"))
        elif highest is not None and lowest > highest:
            found.append(Violation("stopping.min_tokens", f"{lowest} is more than max_tokens {highest}"))
        if lowest < 0:
            found.append(Violation("stopping.min_tokens", f"must not be negative, got {lowest}"))
        return found + self._check_stop_strings(stopping) + self._check_stop_ids(stopping)

    def _check_stop_strings(self, stopping: Stopping) -> list[Violation]:
        config = self._config
        found: list[Violation] = []
        if len(stopping.stop) > config.max_stop_strings:
            found.append(
                Violation("stopping.stop", f"has {len(stopping.stop)} strings, at most {config.max_stop_strings}")
            )
        for i, text in enumerate(stopping.stop[: config.max_stop_strings]):
            if not text:
                found.append(Violation(f"stopping.stop[{i}]", "is empty"))
            elif len(text.encode()) > config.max_stop_string_bytes:
                found.append(Violation(f"stopping.stop[{i}]", f"has more than {config.max_stop_string_bytes} bytes"))
        return found

    def _check_stop_ids(self, stopping: Stopping) -> list[Violation]:
        eos_ids = () if stopping.ignore_eos else self._card.eos_ids
        allowed = MAX_STOP_IDS - len(eos_ids)
        given = len(stopping.stop_token_ids)
        if given > MAX_STOP_IDS or len({*stopping.stop_token_ids, *eos_ids}) > MAX_STOP_IDS:
            return [Violation("stopping.stop_token_ids", f"has {given} ids, at most {allowed} are taken")]
        return [
            Violation(f"stopping.stop_token_ids[{i}]", f"{token} is outside the vocabulary of {self._card.vocab_size}")
            for i, token in enumerate(stopping.stop_token_ids)
            if token >= self._card.vocab_size
        ]

    def _check_tokenizer(self, request: GenerationRequest) -> None:
        self._check_prompt_tokenizer(request.prompt)
        if request.stopping.stop:
            self.require_tokenizer("stopping.stop", "use stop_token_ids instead")
        if request.text:
            self.require_tokenizer("output.text", "set output.text to false and output.token_ids to true")

    def _check_prompt_tokenizer(self, prompt: Prompt) -> None:
        if isinstance(prompt, TokenPrompt):
            return
        self.require_tokenizer("prompt")
        if isinstance(prompt, ChatPrompt) and not self._has_chat_template:
            raise PreconditionError(
                "the checkpoint has no chat template; send text or token ids instead",
                reason="CHAT_TEMPLATE_MISSING",
                field="prompt.chat",
            )


def _check_sampling(sampling: Sampling) -> list[Violation]:
    found: list[Violation] = []
    for name, allowed in _RANGES.items():
        value = getattr(sampling, name)
        if value is not None and value not in allowed:
            found.append(Violation(f"sampling.{name}", f"must be {allowed}, got {value}"))
    return found


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
