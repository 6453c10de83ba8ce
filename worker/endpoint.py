"""Where the leader listens. Apart from the sockets, so that a supervisor need not import what those need."""

from __future__ import annotations

import secrets
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineEndpoint:
    """Where the leader listens, and the secret that it wants to hear first. The supervisor makes it up at random."""

    address: str
    secret: bytes


def private_endpoint(name: str) -> EngineEndpoint:
    """A new address that only this machine can reach, with a secret.

    On Linux the name lives in the abstract namespace of Unix sockets: no file, so nothing is left after any death.
    Elsewhere it is a file in a fresh directory that only this user can read.
    """
    token = secrets.token_hex(16)
    if sys.platform == "linux":
        address = f"ipc://@lightqwen-{name}-{token}"
    else:
        address = f"ipc://{Path(tempfile.mkdtemp(prefix='lightqwen-')) / name}"
    return EngineEndpoint(address, secrets.token_bytes(32))
