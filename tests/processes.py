"""Real servers as processes: starting them, looking at what they started, and seeing that nothing is left."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from service.terminal import read_ready_line

LIGHTQWEN = (sys.executable, "-m", "service.cli")


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until it holds; fail, saying what is wrong, if it does not in time."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """Living processes that `pid` started, directly or not, oldest first."""
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return sorted({int(child) for child in direct} | {pid for child in direct for pid in children(int(child))})


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def listening(pids: Iterable[int]) -> set[str]:
    """Addresses at which these processes listen for TCP (Linux)."""
    found = set()
    for pid in pids:
        sockets = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                sockets.add(os.readlink(descriptor))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                    found.add(_address(fields[1].partition(":")[0]))
    return found


def _address(words: str) -> str:
    """As people write it. `words`: as /proc writes it, 32 bits after 32 bits in the machine's own byte order."""
    native = bytes.fromhex(words)
    count = len(native) // 4
    address = ipaddress.ip_address(struct.pack(f">{count}I", *struct.unpack(f"={count}I", native)))
    return str(getattr(address, "ipv4_mapped", None) or address)


@dataclass
class Serve:
    """`lightqwen serve` on the bundled checkpoint and the CPU, with its standard output and error kept apart."""

    process: subprocess.Popen[str]
    facts: dict[str, str] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    @classmethod
    def start(cls, *options: str, prefix: Sequence[str] = (), env: dict[str, str] | None = None) -> Serve:
        """Start it. `prefix`: a command that runs it, such as `ip netns exec ...`."""
        command = [*prefix, *LIGHTQWEN, "serve", "--device", "cpu", "--metrics-port", "-1", "--log-level", "warning"]
        process = subprocess.Popen(
            [*command, "--num-blocks", "64", "--block-size", "16", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
        )
        return cls(process)

    def wait_ready(self) -> dict[str, str]:
        """Its ready line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        facts = read_ready_line(line)
        assert facts is not None, line or f"it ended: {self.errors()}"
        self.facts = facts
        self.look()
        return facts

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    @property
    def address(self) -> str:
        return self.facts["address"]

    @property
    def workers(self) -> list[int]:
        """What it started to work, oldest first: the gateway, where it has one, then the ranks in order."""
        return [pid for pid in children(self.process.pid) if "resource_tracker" not in command_of(pid)]

    def look(self) -> None:
        """Remember the processes that are there now."""
        self.seen |= {self.process.pid, *children(self.process.pid)}

    def exit_code(self, seconds: float) -> int:
        return self.process.wait(seconds)

    def errors(self) -> str:
        """Everything that it wrote to standard error; waits for its end."""
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def close(self) -> None:
        """End it if a test has not, and see that nothing of it is left."""
        self.look()
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        until(lambda: not any(is_alive(pid) for pid in self.seen), 10.0, "a process is left")
