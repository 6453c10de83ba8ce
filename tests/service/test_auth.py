"""Who is let in: every method of every service, with every kind of token, under every configuration."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from lightqwen.v1 import admin_pb2, generation_pb2, model_pb2
from service.auth import ADMIN_PREFIX, Authenticator, TokenFile
from tests.service.conftest import Serve, Served, collect, generate_request, ids
from tests.service.test_errors import failure
from worker.config import ConfigError

METHODS = [
    (f"/{service.full_name}/{method.name}", bool(method.server_streaming))
    for module, name in ((generation_pb2, "Generation"), (model_pb2, "Model"), (admin_pb2, "Admin"))
    for service in [module.DESCRIPTOR.services_by_name[f"{name}Service"]]
    for method in service.methods
]
TOKENS = {"none": None, "wrong": "guess", "user": "user-token", "admin": "admin-token", "other scheme": "Basic x"}
UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


@dataclass
class Files:
    users: Path
    admins: Path

    def options(self, which: str) -> dict[str, Path]:
        options = {"users": {"auth_tokens_file": self.users}, "admins": {"admin_tokens_file": self.admins}}
        return {key: path for name, given in options.items() if name in which for key, path in given.items()}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    files = Files(tmp_path / "users", tmp_path / "admins")
    files.users.write_text("# who may generate\nalice:user-token\n\nbob:bobs-token\n")
    files.admins.write_text("root:admin-token\n")
    return files


def bearer(token: str | None) -> list[tuple[str, str]]:
    if token is None:
        return []
    return [("authorization", token if " " in token else f"Bearer {token}")]


async def code_of(channel: grpc.aio.Channel, method: str, streams: bool, token: str | None) -> grpc.StatusCode:
    """How an empty request ends; a stream that begins is let in."""
    metadata = grpc.aio.Metadata(*bearer(token))
    try:
        if streams:
            call: Any = channel.unary_stream(method)(b"", metadata=metadata, timeout=5)
            await call.read()
            call.cancel()
        else:
            await channel.unary_unary(method)(b"", metadata=metadata, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def expected(which: str, token: str, method: str) -> grpc.StatusCode | None:
    """None: let in."""
    for_admins = method.startswith(ADMIN_PREFIX) and "admins" in which
    if not for_admins and "users" not in which:
        return None
    known = {name for name in ("user", "admin") if f"{name}s" in which}
    if token not in known:
        return UNAUTHENTICATED
    return DENIED if for_admins and token != "admin" else None


@pytest.mark.parametrize("which", ["nothing", "users", "admins", "users and admins"])
async def test_every_method_with_every_token(serve: Serve, files: Files, which: str) -> None:
    async with serve(**files.options(which)) as served:
        for method, streams in METHODS:
            for token in TOKENS:
                code = await code_of(served.channel, method, streams, TOKENS[token])
                wanted = expected(which, token, method)
                seen = code if code in (UNAUTHENTICATED, DENIED) else None
                assert seen is wanted, f"{method} with {token} under {which}: {code}"


@pytest.fixture
async def guarded(serve: Serve, files: Files) -> AsyncIterator[Served]:
    async with serve(auth_tokens_file=files.users, admin_tokens_file=files.admins) as served:
        yield served


async def test_a_refusal_has_its_reason_and_is_counted(guarded: Served) -> None:
    failed = await failure(guarded.generation.Generate(generate_request(ids(1))))
    assert (failed.code, failed.info.reason) == (UNAUTHENTICATED, "TOKEN_MISSING")
    failed = await failure(guarded.model.GetModel(model_pb2.GetModelRequest(), metadata=bearer("guess")))
    assert (failed.code, failed.info.reason) == (UNAUTHENTICATED, "TOKEN_INVALID")
    assert "guess" not in failed.message
    failed = await failure(guarded.admin.GetLoad(admin_pb2.GetLoadRequest(), metadata=bearer("user-token")))
    assert (failed.code, failed.info.reason) == (DENIED, "ADMIN_ONLY")
    assert guarded.metric("grpc_requests_total", method="Generate", code="UNAUTHENTICATED") == 1
    assert guarded.metric("grpc_requests_total", method="GetLoad", code="PERMISSION_DENIED") == 1


async def test_a_method_that_there_is_not_makes_no_label(guarded: Served) -> None:
    code = await code_of(guarded.channel, "/lightqwen.v1.GenerationService/Whatever", False, None)
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert guarded.metric("grpc_requests_total", method="Whatever", code="UNAUTHENTICATED") == 0


async def test_a_request_that_is_refused_is_not_waited_for(guarded: Served) -> None:
    """A client that announces a call and then sends nothing is answered, too."""
    never: asyncio.Event = asyncio.Event()

    async def requests() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    call: Any = guarded.channel.stream_unary("/lightqwen.v1.GenerationService/Generate")(requests(), timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is UNAUTHENTICATED


async def test_health_is_open_and_reflection_is_not(guarded: Served) -> None:
    health: Any = health_pb2_grpc.HealthStub(guarded.channel)
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(guarded.channel)
    asked = [reflection_pb2.ServerReflectionRequest(list_services="*")]
    failed = await failure(stub.ServerReflectionInfo(iter(asked)))
    assert (failed.code, failed.info.reason) == (UNAUTHENTICATED, "TOKEN_MISSING")
    (answer,) = [answer async for answer in stub.ServerReflectionInfo(iter(asked), metadata=bearer("user-token"))]
    assert answer.list_services_response.service


async def test_the_scheme_is_not_case_sensitive(guarded: Served) -> None:
    for value in ("bearer user-token", "BEARER  user-token "):
        await guarded.model.GetModel(model_pb2.GetModelRequest(), metadata=[("authorization", value)])


async def test_tokens_are_rotated_without_a_restart(
    guarded: Served, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    async def works(token: str) -> bool:
        code = await code_of(guarded.channel, "/lightqwen.v1.ModelService/GetModel", False, token)
        assert code in (grpc.StatusCode.OK, UNAUTHENTICATED)
        return code is grpc.StatusCode.OK

    assert await works("user-token")
    files.users.write_text("alice:user-token\nalice:next-token\n")
    assert await works("user-token")
    assert await works("next-token")
    replace(files.users, "alice:next-token\n")
    assert not await works("user-token")
    assert await works("next-token")

    for broken in ("", "no colon here\n", None):
        caplog.clear()
        if broken is None:
            files.users.unlink()
        else:
            replace(files.users, broken)
        for _ in range(3):
            assert await works("next-token")
        told = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(told) == 1, "told once, not at every call"
        assert "no colon here" not in caplog.text
    replace(files.users, "alice:last-token\n")
    assert await works("last-token")
    assert not await works("next-token")


def replace(path: Path, text: str) -> None:
    """As secret managers do it: another file under the same name."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


async def test_callers_do_not_share_the_prefix_cache(guarded: Served) -> None:
    async def salt(token: str, cache_salt: str = "") -> bytes:
        request = generate_request(ids(1, 2, 3), max_tokens=1, cache={"cache_salt": cache_salt})
        await collect(guarded.generation.Generate(request, metadata=bearer(token)))
        return guarded.leader.submits[-1].cache_salt

    alice, bob = await salt("user-token"), await salt("bobs-token")
    assert alice != bob
    assert alice == await salt("user-token")
    assert len({alice, bob, await salt("user-token", "a"), await salt("bobs-token", "a"), b"a", b""}) == 6


async def test_without_tokens_the_salt_is_the_clients_alone(served: Served) -> None:
    await collect(served.generation.Generate(generate_request(ids(1), max_tokens=1, cache={"cache_salt": "a"})))
    await collect(served.generation.Generate(generate_request(ids(1), max_tokens=1)))
    assert [submit.cache_salt for submit in served.leader.submits] == [b"a", b""]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read .*tokens: No such file or directory"),
        ("", "tokens is empty"),
        ("# nothing\n\n", "tokens has no token"),
        ("alice:abc\njust-a-token\n", "line 2: is not name:token"),
        ("alice:with space\n", "line 1: is not name:token"),
        (":abc\n", "line 1: is not name:token"),
        ("alice:abc\nbob:abc\n", "line 2: another name has the same token"),
    ],
)
def test_a_file_that_is_no_good_refuses_to_start_and_tells_no_token(
    tmp_path: Path, content: str | None, says: str
) -> None:
    path = tmp_path / "tokens"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=says) as caught:
        Authenticator(path, None)
    assert "abc" not in str(caught.value)
    assert "just-a-token" not in str(caught.value)


def test_tokens_are_found_by_their_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("a:12345\r\nb:12345=\n")
    tokens = TokenFile(path)
    assert [tokens.find(token) for token in ("12345", "12345=", "1234", "123456", "", "ü")] == ["a", "b", *[None] * 4]
