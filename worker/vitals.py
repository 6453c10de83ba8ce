"""Whether this node lives and whether it takes requests, for another thread to ask at any time.

The supervisor writes it at each turn of its loop, from what its children last said. Whoever asks gets an answer even
when everything else is stuck, the supervisor included: silence is measured when the question is asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

STALLED_S = 10.0
"""A gateway's event loop that is so late counts as stuck."""

SUPERVISOR_STALLED_S = 30.0
"""A turn of the supervisor's loop takes at most some seconds, even when it waits for killed ranks to be gone."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """When a child's loop was last heard to turn, and how long it may be silent."""

    name: str
    last_beat: float
    patience_s: float


class Vitals:
    """One writer, the supervisor's thread; each field is replaced as a whole."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._turned: float | None = None
        self._pulses: tuple[Pulse, ...] = ()
        self._takes_requests = False
        self._was_ready = False

    def turn(self, *, takes_requests: bool, pulses: Iterable[Pulse]) -> None:
        """The supervisor's loop has turned, and this is what it knows."""
        self._turned = self._clock()
        self._pulses = tuple(pulses)
        self._takes_requests = takes_requests
        self._was_ready = self._was_ready or takes_requests

    @property
    def problem(self) -> str | None:
        """What is stuck that only a restart would mend; None while everything moves or still starts."""
        now = self._clock()
        if self._turned is not None and now - self._turned > SUPERVISOR_STALLED_S:
            return f"the supervisor made no turn for {now - self._turned:.0f} s"
        for pulse in self._pulses:
            if now - pulse.last_beat > pulse.patience_s:
                return f"{pulse.name} made no progress for {now - pulse.last_beat:.0f} s"
        return None

    @property
    def is_ready(self) -> bool:
        """The node does its work: requests are taken, or, where only ranks run, every rank takes part."""
        return self._takes_requests and self.problem is None

    @property
    def was_ready(self) -> bool:
        """The node has been ready once."""
        return self._was_ready
