"""The chat format: Qwen3's special tokens, a template of our own that writes them, and how one exchange is rendered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import jinja2

from model.demo.skills.question import Message, Question, Tool

# As in Qwen3: the first three are special (left out of the text), the others are markup that a reader may see.
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
ADDED_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set ns.last_user = loop.index0 -%}
{%- endfor -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if tools or has_system -%}
    {{- '<|im_start|>system\\n' -}}
    {{- messages[0].content if has_system else '' -}}
    {%- if tools -%}
        {{- '\\n\\n' if has_system else '' -}}
        {{- '# Tools\\n\\nThese functions can be called, one signature on each line:\\n<tools>' -}}
        {%- for tool in tools -%}{{- '\\n' ~ (tool | tojson) -}}{%- endfor -%}
        {{- '\\n</tools>\\n\\nA call is written as a JSON object between tags:\\n<tool_call>\\n' -}}
        {{- '{"name": "the function", "arguments": {"the parameter": "its value"}}\\n</tool_call>' -}}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and loop.first -%}
    {%- elif message.role == 'tool' -%}
        {%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
        {{- '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if message.reasoning_content and loop.index0 > ns.last_user -%}
            {{- '<think>\\n' ~ (message.reasoning_content | trim) ~ '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- message.content or '' -}}
        {%- for call in message.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {{- '\\n' if message.content or not loop.first else '' -}}
            {{- '<tool_call>\\n{"name": ' ~ (function.name | tojson) ~ ', "arguments": ' -}}
            {{- function.arguments if function.arguments is string else function.arguments | tojson -}}
            {{- '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def render(messages: Sequence[Message], tools: Sequence[Tool] = (), *, thinking: bool) -> str:
    """The conversation up to where the assistant's next message begins, exactly as the template renders it."""
    return _template().render(
        messages=messages, tools=list(tools) or None, enable_thinking=thinking, add_generation_prompt=True
    )


def prompt(question: Question, *, thinking: bool) -> str:
    """What the model reads before it answers the question."""
    return render(question.messages, question.tools, thinking=thinking)


def completion(question: Question, *, thinking: bool) -> str:
    """What the model has to write, its end included."""
    if not thinking:
        return question.direct + END_OF_TURN
    return f"<think>\n{question.thought}\n</think>\n\n{question.answer}{END_OF_TURN}"


def without_thought(text: str) -> str:
    """The answer that follows a thought; empty if the thought does not end."""
    if not text.startswith("<think>"):
        return text
    return text.partition("</think>")[2].strip()


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)
