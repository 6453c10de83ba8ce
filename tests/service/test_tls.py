"""TLS on the serving port: who is let in, and a certificate that changes under a running server."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme

from lightqwen.client import AsyncClient, LightqwenError
from service.tls import ServerCertificate
from tests.service.conftest import Serve, Served, collect, generate_request, ids
from tests.service.test_auth import bearer
from worker.config import ConfigError


@dataclass
class Files:
    """A certificate and its key, as a secret that is mounted."""

    cert: Path
    key: Path

    @property
    def options(self) -> dict[str, Path]:
        return {"tls_cert": self.cert, "tls_key": self.key}

    def put(self, leaf: trustme.LeafCert) -> None:
        """Replace both."""
        replace(self.key, leaf.private_key_pem.bytes())
        replace(self.cert, b"".join(pem.bytes() for pem in leaf.cert_chain_pems))


def replace(path: Path, data: bytes) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_bytes(data)
    os.replace(fresh, path)


def issue(ca: trustme.CA) -> trustme.LeafCert:
    return ca.issue_cert("127.0.0.1", "localhost")


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def other_ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path, ca: trustme.CA) -> Files:
    files = Files(tmp_path / "tls.crt", tmp_path / "tls.key")
    files.put(issue(ca))
    return files


@asynccontextmanager
async def connect(served: Served, ca: trustme.CA, client: trustme.LeafCert | None = None) -> AsyncIterator[AsyncClient]:
    """A client on a connection of its own."""
    key, chain = None, None
    if client is not None:
        key, chain = client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes(), key, chain)
    # Nothing shared with an earlier client: another channel would be handed that one's connection.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    async with AsyncClient(served.address, credentials=credentials, options=options) as connected:
        yield connected


async def works(served: Served, ca: trustme.CA, client: trustme.LeafCert | None = None) -> bool:
    async with connect(served, ca, client) as connected:
        try:
            await connected.model(timeout=10)
        except LightqwenError as error:
            if error.code is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


async def test_only_those_who_trust_its_authority_get_in_and_none_in_plain_text(
    serve: Serve, files: Files, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    async with serve(**files.options) as served:
        assert served.facts["tls"] == "on"
        async with connect(served, ca) as client:
            assert len(await client.generate([5], max_tokens=3).text()) > 0
        assert not await works(served, other_ca)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await collect(served.generation.Generate(generate_request(ids(1))))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_new_certificate_is_used_at_once_and_open_streams_go_on(
    serve: Serve, files: Files, ca: trustme.CA, other_ca: trustme.CA
) -> None:
    async with serve(**files.options) as served, connect(served, ca) as before:
        served.leader.step_s = 0.02
        running = asyncio.create_task(before.generate([5], max_tokens=60, ignore_eos=True).text())
        assert await works(served, ca)
        files.put(issue(other_ca))
        assert await works(served, other_ca)
        assert not await works(served, ca)
        assert len(await running) > 0
        await before.model(timeout=10)  # on the connection of before


async def test_a_broken_new_certificate_leaves_the_old_one_and_is_told_once(
    serve: Serve, files: Files, ca: trustme.CA, other_ca: trustme.CA, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve(**files.options) as served:
        good = files.cert.read_bytes()
        for broken in (b"", b"no certificate", good[:300], issue(other_ca).cert_chain_pems[0].bytes(), None):
            caplog.clear()
            if broken is None:
                files.cert.unlink()
            else:
                replace(files.cert, broken)
            assert await works(served, ca)
            assert await works(served, ca)
            told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
            assert len(told) == 1
            assert str(files.cert) in told[0]
        files.put(issue(other_ca))
        assert await works(served, other_ca)


async def test_mutual_tls_lets_in_who_has_a_certificate_of_the_right_authority(
    serve: Serve, files: Files, ca: trustme.CA, other_ca: trustme.CA, tmp_path: Path
) -> None:
    clients, stranger = trustme.CA(), issue(other_ca)
    alice, bob = clients.issue_cert("alice.example"), clients.issue_cert("bob.example")
    client_ca = tmp_path / "clients.crt"
    client_ca.write_bytes(clients.cert_pem.bytes())
    async with serve(**files.options, tls_client_ca=client_ca) as served:
        assert served.facts["tls"] == "mutual"
        assert await works(served, ca, alice)
        assert not await works(served, ca)
        assert not await works(served, ca, stranger)

        salts = []
        for leaf in (alice, bob, alice):
            async with connect(served, ca, leaf) as client:
                await client.generate([5], max_tokens=1).text()
            salts.append(served.leader.submits[-1].cache_salt)
        assert salts[0] == salts[2] != salts[1]
        assert b"alice.example" in salts[0]

        replace(client_ca, other_ca.cert_pem.bytes())
        assert await works(served, ca, stranger)
        assert not await works(served, ca, alice)


async def test_tokens_and_tls_together(serve: Serve, files: Files, ca: trustme.CA, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:user-token\n")
    async with serve(**files.options, auth_tokens_file=tokens) as served:
        async with connect(served, ca) as client:
            with pytest.raises(LightqwenError) as caught:
                await client.model(timeout=10)
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
        credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
        async with AsyncClient(served.address, credentials=credentials, metadata=bearer("user-token")) as client:
            assert (await client.model(timeout=10)).name == "tiny"


def test_what_cannot_be_used_refuses_to_start(tmp_path: Path, files: Files, other_ca: trustme.CA) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing: No such file"):
        ServerCertificate(tmp_path / "nothing", files.key)
    with pytest.raises(ConfigError, match=r"cannot read .*nothing: No such file"):
        ServerCertificate(files.cert, files.key, tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty is empty"):
        ServerCertificate(files.cert, tmp_path / "empty")
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(ConfigError, match=r"tls.crt and .*junk are not a certificate and its key .*: .*PEM") as caught:
        ServerCertificate(files.cert, tmp_path / "junk")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="junk is not a certificate"):
        ServerCertificate(files.cert, files.key, tmp_path / "junk")
    other = Files(tmp_path / "other.crt", tmp_path / "other.key")
    other.put(issue(other_ca))
    with pytest.raises(ConfigError, match="KEY_VALUES_MISMATCH"):
        ServerCertificate(files.cert, other.key)


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked(tmp_path: Path, files: Files) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    files.key.write_bytes(locked)
    with pytest.raises(ConfigError, match="passphrase"):
        ServerCertificate(files.cert, files.key)
