"""Text and chats become what transformers would make of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.checkpoint import TokenizerFiles, read_card, read_tokenizer_files
from service.errors import InvalidRequestError
from service.requests import ChatPrompt, TextPrompt
from service.tokenizing import ChatTemplate, TextCodec
from tests.service.conftest import EOS, TEMPLATE
from worker.config import ConfigError

CHATS: list[dict[str, Any]] = [
    {"messages": ({"role": "user", "content": "hello"},)},
    {"messages": ({"role": "user", "content": "<&> \"quotes\" 'ż' 你好\n\n x"},), "enable_thinking": False},
    {"messages": ({"role": "system", "content": ""}, {"role": "user", "content": "a"}), "enable_thinking": True},
    {
        "messages": (
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "reasoning_content": "why"},
            {"role": "user", "content": "again"},
        )
    },
    {
        "messages": ({"role": "user", "content": "weather?"},),
        "tools": ({"type": "function", "function": {"name": "look", "description": "<b>", "parameters": {"a": 1}}},),
    },
]


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def codec_of(folder: Path, executor: ThreadPoolExecutor) -> TextCodec:
    files = read_tokenizer_files(folder)
    assert files is not None
    return TextCodec(files, executor)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("which", ["tiny", "demo"])
async def test_chats_are_rendered_and_encoded_as_transformers_does(
    chat: dict[str, Any], which: str, checkpoint: Path, demo_checkpoint: Path, executor: ThreadPoolExecutor
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = checkpoint if which == "tiny" else demo_checkpoint
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    codec = codec_of(folder, executor)
    arguments = {"enable_thinking": chat["enable_thinking"]} if "enable_thinking" in chat else {}
    template = {"add_generation_prompt": True, "tools": list(chat.get("tools", ())) or None, **arguments}
    expected = reference.apply_chat_template(list(chat["messages"]), tokenize=False, **template)
    encoded = await codec.encode(ChatPrompt(**chat))
    assert encoded.text == expected
    assert encoded.ids.tolist() == reference(expected, add_special_tokens=False)["input_ids"]
    plain = await codec.encode(TextPrompt("<think> hello <|im_end|> żółw"))
    assert plain.ids.tolist() == reference("<think> hello <|im_end|> żółw")["input_ids"]


def render(template: str, **chat: Any) -> str:
    return ChatTemplate(template, {"eos_token": EOS}).render(
        ChatPrompt(messages=({"role": "user", "content": "c"},), **chat)
    )


async def test_the_event_loop_goes_on_while_a_long_text_is_tokenized(
    demo_checkpoint: Path, executor: ThreadPoolExecutor
) -> None:
    codec = codec_of(demo_checkpoint, executor)
    began = time.monotonic()
    encoding = asyncio.create_task(codec.encode(TextPrompt("hello world " * 50_000)))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > (time.monotonic() - began) / 0.05
    assert len((await encoding).ids) > 50_000


def test_the_dialect() -> None:
    assert (
        render("{% for m in messages %}\n  {% if loop.first %}\n    {{ m.content }}\n{% endif %}{% endfor %}")
        == "    c\n"
    )
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'a': '<ż>'} | tojson }}") == '{"a": "<ż>"}'
    assert render("{{ eos_token }}") == EOS
    assert render("{{ extra.deep[1] }}", template_arguments={"extra": {"deep": [1, 2]}}) == "2"
    assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_a_template_that_refuses_is_quoted() -> None:
    with pytest.raises(InvalidRequestError, match="do not shout"):
        render(TEMPLATE, template_arguments={"shout": True})


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.no.such }}",
    ],
)
def test_a_template_can_do_nothing_but_text(attack: str) -> None:
    with pytest.raises(InvalidRequestError, match="cannot render") as caught:
        render(attack)
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"


def test_a_broken_template_is_found_at_the_start() -> None:
    with pytest.raises(ConfigError, match="chat template is broken at line 2"):
        ChatTemplate("\n{% if %}", {})


def test_a_named_template_and_a_template_file_are_found(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((checkpoint / "tokenizer.json").read_text())
    named = '{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "d"}]}'
    (tmp_path / "tokenizer_config.json").write_text(named)
    files = read_tokenizer_files(tmp_path)
    assert files is not None
    assert files.chat_template == "d"
    (tmp_path / "chat_template.jinja").write_text("file")
    files = read_tokenizer_files(tmp_path)
    assert files is not None
    assert files.chat_template == "file"


def test_a_tokenizer_that_cannot_be_used_is_a_readable_error(executor: ThreadPoolExecutor) -> None:
    text = '{"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"a": 0}}}'
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be used"):
        TextCodec(TokenizerFiles(tokenizer_json=text, chat_template=None, special_tokens={}), executor)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "JSON object"),
        ("config.json", '{"vocab_size": "many", "max_position_embeddings": 1}', "vocab_size must be an integer"),
        ("config.json", '{"vocab_size": 5}', "max_position_embeddings must be a positive integer, got None"),
        ("generation_config.json", '{"temperature": "hot"}', "temperature must be a number"),
        ("generation_config.json", '{"eos_token_id": ["x"]}', "eos_token_id must be token ids"),
    ],
)
def test_a_broken_folder_is_a_readable_error(
    file: str, content: str | None, says: str, checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text((checkpoint / name).read_text())
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ConfigError, match=says):
        read_card(tmp_path, name="x")


def test_do_sample_false_means_greedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5, "max_position_embeddings": 9}')
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "max_new_tokens": 7}')
    card = read_card(tmp_path, name="x")
    assert (card.defaults.temperature, card.default_max_tokens, card.eos_ids) == (0.0, 7, ())
