"""ModelService, AdminService, Tokenize and Detokenize."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import grpc
from tokenizers import Tokenizer

from lightqwen.v1 import admin_pb2, common_pb2, generation_pb2, model_pb2
from service.admin_service import TokenRate
from tests.service.conftest import EOS, Serve, Served, collect, eventually, generate_request, ids
from tests.service.fake_leader import MAX_MODEL_LEN, VOCAB_SIZE, FakeLeader
from tests.service.test_errors import failure, failure_by_reading


async def test_the_model_is_told(served: Served, checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = await served.model.GetModel(model_pb2.GetModelRequest(model="tiny"))
    assert (model.name, model.context_length, model.vocab_size) == ("tiny", MAX_MODEL_LEN, VOCAB_SIZE)
    assert list(model.eos_token_ids) == [tokenizer.token_to_id(EOS), 0]
    assert model.tokenizer_sha256 == hashlib.sha256((checkpoint / "tokenizer.json").read_bytes()).hexdigest()
    assert (model.default_sampling.temperature, model.default_sampling.top_k) == (0.6, 20)
    assert not model.default_sampling.HasField("seed")
    assert {model_pb2.CAPABILITY_CHAT_INPUT, model_pb2.CAPABILITY_STOP_STRINGS} <= set(model.capabilities)
    assert model_pb2.CAPABILITY_LOGPROBS not in model.capabilities
    assert (await failure(served.model.GetModel(model_pb2.GetModelRequest(model="x")))).info.reason == "MODEL_NOT_FOUND"


async def test_the_server_is_told_without_its_secrets(served: Served, checkpoint: Path) -> None:
    info = await served.model.GetServerInfo(model_pb2.GetServerInfoRequest())
    assert (info.api_version, info.tensor_parallel_size, info.kv_blocks_total) == ("lightqwen.v1", 1, 100)
    assert (info.device, info.dtype, info.engine_epoch) == ("cpu", "float32", 1)
    assert info.limits.max_queued_requests == 1024
    assert info.instance_id
    assert str(checkpoint) not in str(info)


async def test_tokenize_shows_what_a_prompt_becomes(served: Served, tokenizer: Tokenizer) -> None:
    request = generation_pb2.TokenizeRequest(prompt=common_pb2.Prompt(text="hello żółw"))
    got = await served.generation.Tokenize(request)
    assert list(got.token_ids) == tokenizer.encode("hello żółw").ids
    assert (got.count, got.rendered_prompt) == (len(got.token_ids), "hello żółw")
    user = common_pb2.ChatMessage(role=common_pb2.ROLE_USER, content="hi")
    tool = common_pb2.Tool(name="look", parameters_json_schema='{"type": "object"}')
    request = generation_pb2.TokenizeRequest(prompt=common_pb2.Prompt(chat={"messages": [user], "tools": [tool]}))
    got = await served.generation.Tokenize(request)
    assert got.rendered_prompt.startswith("<|im_start|>user\nhi<|im_end|>")
    assert '"name": "look"' in got.rendered_prompt
    request = generation_pb2.TokenizeRequest(
        prompt=common_pb2.Prompt(chat={"messages": [user], "tool_choice": {"mode": 1}})
    )
    assert (await failure(served.generation.Tokenize(request))).code is grpc.StatusCode.UNIMPLEMENTED


async def test_detokenize_is_its_inverse(served: Served, tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("你好 🙂").ids, tokenizer.token_to_id(EOS)]
    got = await served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=tokens))
    assert got.text == "你好 🙂" + EOS
    request = generation_pb2.DetokenizeRequest(token_ids=tokens, skip_special_tokens=True)
    assert (await served.generation.Detokenize(request)).text == "你好 🙂"
    failed = await failure(served.generation.Detokenize(generation_pb2.DetokenizeRequest(token_ids=[VOCAB_SIZE])))
    assert failed.fields == ["token_ids[0]"]


async def test_an_administrator_ends_a_stream_with_aborted(served: Served) -> None:
    served.leader.step_s = 0.02
    calls = {
        name: served.generation.Generate(generate_request(ids(1), max_tokens=200, request_id=name)) for name in "abc"
    }
    endings = {name: asyncio.create_task(failure(call)) for name, call in calls.items()}
    await eventually(lambda: len(served.leader.running) == 3)
    served.leader.hold = True  # they wait for a token; nothing but the abort wakes them
    got = await served.admin.Abort(admin_pb2.AbortRequest(request_ids=["a", "nobody"]))
    assert [(r.request_id, r.outcome) for r in got.results] == [
        ("a", admin_pb2.ABORT_OUTCOME_ABORTED),
        ("nobody", admin_pb2.ABORT_OUTCOME_NOT_FOUND),
    ]
    failed = await endings["a"]
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.ABORTED, "ADMIN_ABORT")
    assert not endings["b"].done()
    for too_much in (["a"] * 501, ["a", "b" * 129], ["é"]):
        failed = await failure(served.admin.Abort(admin_pb2.AbortRequest(request_ids=too_much)))
        assert (failed.code, failed.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_ids"])
    got = await served.admin.Abort(admin_pb2.AbortRequest(all=True))
    assert {result.request_id for result in got.results} == {"b", "c"}
    for name in "bc":
        assert (await endings[name]).code is grpc.StatusCode.ABORTED
    await eventually(lambda: len(served.leader.aborts) == 3 and not served.leader.running)


async def test_an_aborted_stream_that_nobody_reads_is_let_go_by_the_engine(served: Served) -> None:
    served.leader.step_s = 0.02
    call = served.generation.Generate(generate_request(ids(1), max_tokens=200, request_id="slow"))
    await call.read()
    await served.admin.Abort(admin_pb2.AbortRequest(request_ids=["slow"]))
    await eventually(lambda: not served.leader.running)
    assert (await failure_by_reading(call)).code is grpc.StatusCode.ABORTED


async def test_the_load_is_told_and_watched(served: Served) -> None:
    load = (await served.admin.GetLoad(admin_pb2.GetLoadRequest())).load
    assert (load.engine_state, load.draining, load.streams) == (admin_pb2.ENGINE_STATE_READY, False, 0)
    assert load.kv_blocks_total == 100
    served.leader.hold_start = True
    call = served.generation.Generate(generate_request(ids(*[3] * 40), max_tokens=150))
    await eventually(lambda: len(served.leader.submits) == 1)
    watch = served.admin.WatchLoad(admin_pb2.WatchLoadRequest(interval={"nanos": 50_000_000}))
    load = (await watch.read()).load
    assert (load.streams, load.waiting, load.waiting_prompt_tokens) == (1, 1, 40)
    served.leader.hold_start = False
    running = asyncio.create_task(collect(call))
    seen = [(await watch.read()).load for _ in range(4)]
    assert any(load.running == 1 and load.waiting == 0 for load in seen)
    assert any(load.output_tokens_per_second > 50 for load in seen)
    await running
    watch.cancel()
    failed = await failure(served.admin.WatchLoad(admin_pb2.WatchLoadRequest(interval={"nanos": 1})))
    assert failed.fields == ["interval"]


def test_the_rate_begins_anew_with_the_engine() -> None:
    now = [0.0]
    rate = TokenRate(lambda: now[0], min_window_s=1.0)
    now[0] = 2.0
    assert rate.look(100) == 50
    now[0] = 2.5
    assert rate.look(120) == 50  # too soon for another
    now[0] = 4.0
    assert rate.look(10) == 0
    now[0] = 5.0
    assert rate.look(40) == 30


async def test_drain_refuses_the_new_and_waits_for_the_old(served: Served, leader: FakeLeader) -> None:
    leader.step_s = 0.01
    running = asyncio.create_task(collect(served.generation.Generate(generate_request(ids(1), max_tokens=50))))
    await eventually(lambda: bool(leader.running))
    assert (await served.admin.Drain(admin_pb2.DrainRequest())).streams == 1
    failed = await failure(served.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    assert (await served.admin.Drain(admin_pb2.DrainRequest(wait={"seconds": 20}))).streams == 0
    assert len((await running).ids) == 50
    assert (await served.admin.GetLoad(admin_pb2.GetLoadRequest())).load.draining


async def test_the_cache_is_flushed(served: Served) -> None:
    assert (await served.admin.FlushCache(admin_pb2.FlushCacheRequest())).blocks == 7


async def test_flushing_without_an_engine_is_unavailable(serve: Serve, leader: FakeLeader) -> None:
    leader.die()
    async with serve(wait=False) as served:
        failed = await failure(served.admin.FlushCache(admin_pb2.FlushCacheRequest()))
        assert (failed.code, failed.info.reason) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
