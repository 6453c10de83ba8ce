"""From text and chats to token ids, on threads of its own so that the event loop never waits for it."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, TypeVar

import jinja2
import jinja2.ext
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from service.checkpoint import TokenizerFiles
from service.detokenizing import TokenBytes
from service.errors import InvalidRequestError, Violation
from service.requests import ChatPrompt, TextPrompt
from worker.config import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: np.ndarray  # [n] int
    text: str  # what was encoded; empty for a prompt that came as ids


class ChatTemplate:
    """A checkpoint's chat template, compiled once, in Jinja2's immutable sandbox: it can compute text and nothing else.

    The dialect is the one that templates on the hub are written for: trim_blocks, lstrip_blocks, loop controls, a
    `tojson` that leaves HTML alone, `raise_exception` and `strftime_now`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the checkpoint's chat template is broken at line {error.lineno}: {error.message}"
            ) from error
        self._special_tokens = dict(special_tokens)

    def render(self, chat: ChatPrompt) -> str:
        """The conversation as the model wants to read it, up to where its next message begins.

        Raises:
            InvalidRequestError: the template refuses the conversation, or breaks on it.
        """
        variables: dict[str, Any] = {**self._special_tokens, **chat.template_arguments}
        if chat.enable_thinking is not None:
            variables["enable_thinking"] = chat.enable_thinking
        try:
            return self._template.render(
                messages=list(chat.messages), tools=list(chat.tools) or None, add_generation_prompt=True, **variables
            )
        except _TemplateRefusalError as refusal:
            raise InvalidRequestError([Violation("prompt.chat", f"the chat template says: {refusal}")]) from refusal
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            found = Violation("prompt.chat", "the chat template cannot render this conversation")
            raise InvalidRequestError([found], reason="CHAT_TEMPLATE_FAILED") from error


class TextCodec:
    """The checkpoint's tokenizer and chat template. `table` turns ids back into text, see `detokenizing`."""

    def __init__(self, files: TokenizerFiles, executor: ThreadPoolExecutor) -> None:
        self.table = TokenBytes.from_tokenizer_json(files.tokenizer_json)
        try:
            self._tokenizer = Tokenizer.from_str(files.tokenizer_json)
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise ConfigError(f"tokenizer.json cannot be used: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._template = ChatTemplate(files.chat_template, files.special_tokens) if files.chat_template else None
        self._executor = executor

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    async def encode(self, prompt: TextPrompt | ChatPrompt, *, add_special_tokens: bool = True) -> Encoded:
        """Render and encode. A chat gets no special tokens beyond those that its template writes.

        Raises:
            InvalidRequestError: the chat template refuses.
        """
        return await self._off_the_loop(partial(self._encode, prompt, add_special_tokens))

    async def decode(self, ids: np.ndarray, *, skip_special: bool) -> str:
        return await self._off_the_loop(partial(self.table.decode, ids.tolist(), skip_special=skip_special))

    def _encode(self, prompt: TextPrompt | ChatPrompt, add_special_tokens: bool) -> Encoded:
        if isinstance(prompt, ChatPrompt):
            assert self._template is not None, "a chat was let through to a checkpoint without a chat template"
            text, add_special_tokens = self._template.render(prompt), False
        else:
            text = prompt.text
        # A batch of one: only batches are encoded without holding Python's lock, under which the event loop would wait.
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return Encoded(np.array(encoding.ids, dtype=np.int64), text)

    async def _off_the_loop(self, work: Callable[[], T]) -> T:
        """Cancelling takes the work back as long as no thread has begun with it."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


class _TemplateRefusalError(Exception):
    """The template called `raise_exception`."""


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateRefusalError(str(message)[:500])


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
