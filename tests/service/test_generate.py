"""Generate from end to end: a channel, the gateway, the engine's protocol."""

from __future__ import annotations

import asyncio

import pytest
from tokenizers import Tokenizer

from lightqwen.v1 import common_pb2
from tests.service.conftest import EOS, Serve, Served, collect, eventually, generate_request, ids
from tests.service.fake_leader import MAX_MODEL_LEN, count_up, script


async def test_a_stream_starts_gives_its_tokens_in_order_and_finishes(served: Served) -> None:
    got = await collect(served.generation.Generate(generate_request(ids(5, 6, 7), max_tokens=20, request_id="one")))
    assert got.started.request_id == "one"
    assert got.started.model == "tiny"
    assert got.started.prompt_tokens == 3
    assert got.ids == [count_up([5, 6, 7], i) for i in range(20)]
    assert [d.output_tokens_total for d in got.deltas] == sorted(d.output_tokens_total for d in got.deltas)
    assert got.deltas[-1].output_tokens_total == 20
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert got.finished.WhichOneof("matched") is None
    assert got.finished.usage == common_pb2.Usage(prompt_tokens=3, output_tokens=20)


async def test_the_text_is_the_tokens_text(served: Served, tokenizer: Tokenizer) -> None:
    text = "hello żółw 你好 🙂🙂 the end"
    served.leader.rule = script(tokenizer.encode(text).ids)
    request = generate_request("the quick", max_tokens=len(tokenizer.encode(text).ids))
    got = await collect(served.generation.Generate(request))
    assert got.text == text
    assert got.started.prompt_tokens == len(tokenizer.encode("the quick").ids)


async def test_a_code_point_is_never_cut(served: Served, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.token_to_id(piece) for piece in ("ð", "Ł", "Ļ", "Ĥ")]  # the bytes f0 9f 99 82
    served.leader.rule = script(tokens)
    got = await collect(served.generation.Generate(generate_request("x", max_tokens=4)))
    assert got.ids == tokens
    assert [delta.text for delta in got.deltas if delta.text] == ["🙂"]


async def test_half_a_code_point_at_the_end_is_a_replacement_character(served: Served, tokenizer: Tokenizer) -> None:
    served.leader.rule = script([tokenizer.token_to_id("a"), tokenizer.token_to_id("ð"), tokenizer.token_to_id("Ł")])
    got = await collect(served.generation.Generate(generate_request("x", max_tokens=3)))
    assert got.text == "a\N{REPLACEMENT CHARACTER}"


async def test_the_first_token_comes_alone_and_slow_readers_get_more_at_once(served: Served) -> None:
    served.leader.step_s = 0
    requests = [generate_request(ids(9), max_tokens=200) for _ in range(8)]
    results = await asyncio.gather(*(collect(served.generation.Generate(request)) for request in requests))
    for got in results:
        assert len(got.deltas[0].token_ids) == 1
        assert got.ids == [count_up([9], i) for i in range(200)]
    assert sum(len(got.deltas) for got in results) < 8 * 200


async def test_what_is_left_open_comes_from_the_checkpoint_and_is_echoed(served: Served) -> None:
    got = await collect(served.generation.Generate(generate_request(ids(1, 2), max_tokens=None)))
    sampling = got.started.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
    assert (sampling.min_p, sampling.presence_penalty, sampling.repetition_penalty) == (0, 0, 1)
    assert sampling.HasField("seed")
    assert served.leader.submits[0].sampling.seed == sampling.seed
    assert got.started.stopping.max_tokens == MAX_MODEL_LEN - 2
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_CONTEXT_FULL
    assert got.finished.usage.output_tokens == MAX_MODEL_LEN - 2


async def test_what_the_client_says_goes_before(served: Served) -> None:
    asked = common_pb2.SamplingParameters(temperature=0.0, top_k=0, top_p=1.0, min_p=0.125, seed=2**64 - 1)
    request = generate_request(ids(1), sampling=asked, cache={"cache_salt": "mine", "bypass_prefix_cache": True})
    got = await collect(served.generation.Generate(request))
    submit = served.leader.submits[0]
    assert (submit.sampling.temperature, submit.sampling.top_k, submit.sampling.top_p) == (0, 0, 1)
    assert (submit.sampling.min_p, submit.sampling.seed) == (0.125, 2**64 - 1)
    assert got.started.sampling.seed == 2**64 - 1
    assert (submit.cache_salt, submit.use_prefix_cache) == (b"mine", False)


async def test_seeds_differ_when_nobody_names_one(served: Served) -> None:
    for _ in range(2):
        await collect(served.generation.Generate(generate_request(ids(1), max_tokens=1)))
    first, second = served.leader.submits
    assert first.sampling.seed != second.sampling.seed


async def test_eos_ends_and_is_named_but_not_shown(served: Served, tokenizer: Tokenizer) -> None:
    eos = tokenizer.token_to_id(EOS)
    served.leader.rule = script([*tokenizer.encode("hello").ids, eos])
    got = await collect(served.generation.Generate(generate_request("x", max_tokens=50)))
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_EOS
    assert got.finished.matched_token_id == eos
    assert got.text == "hello"
    assert got.ids[-1] == eos


async def test_ignore_eos_goes_on(served: Served, tokenizer: Tokenizer) -> None:
    served.leader.rule = script([tokenizer.token_to_id(EOS)])
    request = generate_request("x", max_tokens=5)
    request.stopping.ignore_eos = True
    request.output.skip_special_tokens = False
    got = await collect(served.generation.Generate(request))
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_MAX_TOKENS
    assert got.text == EOS * 5


async def test_a_stop_token_is_hidden_unless_it_is_wanted(served: Served, tokenizer: Tokenizer) -> None:
    dot = tokenizer.token_to_id(";")
    served.leader.rule = script([*tokenizer.encode("hello").ids, dot])
    request = generate_request("x", max_tokens=50)
    request.stopping.stop_token_ids.append(dot)
    got = await collect(served.generation.Generate(request))
    assert (got.text, got.finished.matched_token_id) == ("hello", dot)
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_STOP_TOKEN
    request.stopping.include_stop = True
    assert (await collect(served.generation.Generate(request))).text == "hello;"


async def test_a_stop_string_ends_the_request_in_the_engine_too(served: Served, tokenizer: Tokenizer) -> None:
    served.leader.rule = script(tokenizer.encode("one two three four five six seven").ids)
    request = generate_request("x", max_tokens=200)
    request.stopping.stop.extend(["three fo", "never"])
    got = await collect(served.generation.Generate(request))
    assert got.text == "one two "
    assert got.finished.finish_reason == common_pb2.FINISH_REASON_STOP_STRING
    assert got.finished.matched_stop == "three fo"
    assert got.finished.usage.output_tokens == len(got.ids)
    assert tokenizer.decode(got.ids).startswith("one two three fo")
    await eventually(lambda: len(served.leader.aborts) == 1 and not served.leader.running)
    request.stopping.include_stop = True
    assert (await collect(served.generation.Generate(request))).text == "one two three fo"


async def test_min_tokens_delays_stop_strings(served: Served, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.token_to_id(letter) for letter in "abcabcabc"]
    served.leader.rule = script(tokens)
    request = generate_request("x", max_tokens=9)
    request.stopping.stop.append("bc")
    request.stopping.min_tokens = 4
    got = await collect(served.generation.Generate(request))
    assert got.text == "abca"
    assert got.finished.usage.output_tokens == 6


async def test_a_chat_is_rendered_with_the_template(served: Served, tokenizer: Tokenizer) -> None:
    chat = common_pb2.Chat(
        messages=[
            common_pb2.ChatMessage(role=common_pb2.ROLE_SYSTEM, content="be brief"),
            common_pb2.ChatMessage(role=common_pb2.ROLE_USER, content="hello"),
        ],
        enable_thinking=False,
    )
    got = await collect(served.generation.Generate(generate_request(common_pb2.Prompt(chat=chat))))
    rendered = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert got.started.prompt_tokens == len(tokenizer.encode(rendered).ids)
    assert list(memoryview(served.leader.submits[0].prompt).cast("i")) == tokenizer.encode(rendered).ids


async def test_text_can_be_left_out(served: Served) -> None:
    request = generate_request(ids(3), max_tokens=30, output={"text": False, "token_ids": True})
    got = await collect(served.generation.Generate(request))
    assert (got.text, len(got.ids)) == ("", 30)


async def test_usage_and_timings_are_told(served: Served) -> None:
    served.leader.cached_tokens = 2
    got = await collect(served.generation.Generate(generate_request(ids(1, 2, 3), max_tokens=10)))
    assert got.started.cached_tokens == 2
    assert got.finished.usage == common_pb2.Usage(prompt_tokens=3, cached_tokens=2, output_tokens=10)
    timings = got.finished.timings
    queue, prefill, ttft, decode, total = (
        getattr(timings, name).ToTimedelta().total_seconds()
        for name in ("queue", "prefill", "time_to_first_token", "decode", "total")
    )
    assert min(queue, prefill, ttft) >= 0
    assert abs(queue + prefill - ttft) < 1e-4
    assert abs(ttft + decode - total) < 1e-4
    assert decode >= 9 * served.leader.step_s / 2


@pytest.mark.parametrize("stop", [False, True])
async def test_preemptions_are_told_however_a_request_ends(served: Served, tokenizer: Tokenizer, stop: bool) -> None:
    served.leader.preempts_after = {1, 3}
    served.leader.cached_tokens = 2
    served.leader.rule = script(tokenizer.encode("one two three four five six seven").ids)
    request = generate_request(ids(1, 2, 3), max_tokens=5)
    if stop:
        request.stopping.max_tokens = 200
        request.stopping.stop.append("five")
    got = await collect(served.generation.Generate(request))
    reason = common_pb2.FINISH_REASON_STOP_STRING if stop else common_pb2.FINISH_REASON_MAX_TOKENS
    assert (got.finished.finish_reason, got.finished.timings.preemptions) == (reason, 2)
    assert got.finished.usage.cached_tokens == got.started.cached_tokens == 2


async def test_a_checkpoint_without_a_tokenizer_serves_token_ids(serve: Serve, bare_checkpoint) -> None:
    async with serve(model=str(bare_checkpoint)) as served:
        request = generate_request(ids(4), max_tokens=5, output={"text": False, "token_ids": True})
        got = await collect(served.generation.Generate(request))
        assert got.ids == [count_up([4], i) for i in range(5)]
