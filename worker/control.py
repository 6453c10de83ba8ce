"""The line between the supervisor and each process it started: who is ready, what failed, what happened to the engine.

One duplex pipe per child, typed JSON on it, no pickle. The pipe is also how a child learns that its supervisor is gone:
it reads end-of-file.
"""

from __future__ import annotations

import contextlib
import select
from multiprocessing.connection import Connection

import msgspec

# ---- child -> supervisor ---------------------------------------------------------------------------------------------


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """One line about long work, such as loading weights. `done` of `total` where both are known."""

    what: str
    done: int = 0
    total: int = 0


class Up(msgspec.Struct, frozen=True, tag="up"):
    """The process does its work from now on. `facts` are for the ready line (address, KV blocks, ...)."""

    facts: dict[str, str | int | float]


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The process gives up for a reason that a user can mend: one readable line. It exits with a code other than 0."""

    reason: str


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """The process's loop turns; it has finished so many steps. Without another one in `patience_s` it is stuck."""

    steps: int
    patience_s: float | None = None  # None: as told before


class Serving(msgspec.Struct, frozen=True, tag="serving"):
    """The gateway takes requests, or takes none: the engine is not ready, or it drains."""

    now: bool


# ---- supervisor -> child ---------------------------------------------------------------------------------------------


class EngineLost(msgspec.Struct, frozen=True, tag="engine_lost"):
    """The ranks of this epoch died and are being started again: hold what runs, refuse what is new."""

    epoch: int
    reason: str


class EngineDead(msgspec.Struct, frozen=True, tag="engine_dead"):
    """The ranks will not come back: fail everything that runs."""

    reason: str


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Take nothing new, finish what runs, and end."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End now, whatever runs."""


# ---- gateway -> supervisor -> gateway: what the gateways of one server say to each other -----------------------------


class Standing(msgspec.Struct, frozen=True):
    """What one gateway has: Generate calls that are open, and what of them waits for the engine to begin."""

    streams: int = 0
    waiting: int = 0
    waiting_tokens: int = 0  # of their prompts


class Look(msgspec.Struct, frozen=True, tag="look"):
    """Tell how you stand."""


class CloseDoor(msgspec.Struct, frozen=True, tag="close_door"):
    """Take nothing new from now on; answer when nothing runs any more, or when this time is over."""

    wait_s: float


class AbortCalls(msgspec.Struct, frozen=True, tag="abort_calls"):
    """End these calls, or all whose ids come behind `after` in order, as many as an answer can name."""

    request_ids: list[str]
    everything: bool
    after: str = ""


Question = Look | CloseDoor | AbortCalls


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A question of gateway `asker` to every other one; `ticket` is the asker's name for it."""

    asker: int
    ticket: int
    question: Question


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """How a gateway stands once it has done what it was asked to, and which calls it ended."""

    asker: int
    ticket: int
    standing: Standing = Standing()
    aborted: list[str] = []
    more: bool = False  # calls were to be ended, but not named any more: those behind the last one of `aborted`


class Figures(msgspec.Struct, frozen=True, tag="figures"):
    """What a gateway has counted since it began (`service.metrics`), for gateway 0, which tells Prometheus."""

    gateway: int
    standing: Standing
    counted: bytes
    last: bool = False  # it has nothing left to do, and is about to end


BetweenGateways = Ask | Answer | Figures

MAX_OFFER_BYTES = 128 * 1024
"""A message between gateways that is longer is not passed on."""

MAX_NAMED_CALLS = 500
"""So many request ids, of up to 128 printable ASCII characters, a message between gateways is sure to hold."""

FromChild = Progress | Up | Fatal | Heartbeat | Serving | BetweenGateways
ToChild = EngineLost | EngineDead | Drain | Stop | BetweenGateways

_from_child: msgspec.json.Decoder[FromChild] = msgspec.json.Decoder(FromChild)
_to_child: msgspec.json.Decoder[ToChild] = msgspec.json.Decoder(ToChild)
_encode = msgspec.json.Encoder().encode


class ChildEnd:
    """What a child holds. `fileno()` is readable when the supervisor spoke or died."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: FromChild) -> None:
        """Tell the supervisor. Says nothing if it is gone: then this process is about to end too."""
        try:
            self._connection.send_bytes(_encode(message))
        except (BrokenPipeError, ConnectionResetError):
            return

    def offer(self, message: BetweenGateways) -> None:
        """Send, but never wait: see `_offer`."""
        _offer(self._connection, message)

    def receive(self) -> ToChild | None:
        """The next message, or None when the supervisor is gone. Blocks unless `fileno()` is readable."""
        try:
            return _to_child.decode(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return None


class SupervisorEnd:
    """What the supervisor holds for one child."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, message: ToChild) -> None:
        try:
            self.connection.send_bytes(_encode(message))
        except (BrokenPipeError, ConnectionResetError):
            return  # its sentinel tells the rest

    def offer(self, message: BetweenGateways) -> None:
        """Send, but never wait: see `_offer`."""
        _offer(self.connection, message)

    def receive(self) -> list[FromChild]:
        """All messages that wait; never blocks."""
        messages: list[FromChild] = []
        try:
            while self.connection.poll():
                messages.append(_from_child.decode(self.connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            pass  # its sentinel tells the rest
        return messages

    def close(self) -> None:
        self.connection.close()


def _offer(connection: Connection, message: BetweenGateways) -> None:
    """Send, unless that could mean to wait for an end that does not read: then the message is lost, which whoever waits
    for it takes for silence. Linux calls a pipe of this kind writable while three quarters of its buffer (208 KiB
    unless the machine is set up otherwise) are free.
    """
    data = _encode(message)
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    if len(data) <= MAX_OFFER_BYTES and poll.poll(0):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send_bytes(data)
