"""The queue's bookkeeping, against a model of it that is too simple to be wrong."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from service.admission import Admission, Ticket, part_of
from service.errors import OverloadedError, ServeError, UnavailableError

MAX_REQUESTS, MAX_TOKENS, MAX_STREAMS = 4, 50, 6


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(max_requests=MAX_REQUESTS, max_tokens=MAX_TOKENS, max_streams=MAX_STREAMS)
        self.waiting: dict[Ticket, int] = {}
        self.running: list[Ticket] = []

    @rule(tokens=st.integers(1, 80))
    def arrive(self, tokens: int) -> None:
        waiting = sum(self.waiting.values())
        fits = len(self.waiting) < MAX_REQUESTS and len(self.waiting) + len(self.running) < MAX_STREAMS
        fits = fits and (not waiting or waiting + tokens <= MAX_TOKENS)
        if fits:
            self.waiting[self.admission.admit(tokens)] = tokens
        else:
            with pytest.raises(OverloadedError) as caught:
                self.admission.admit(tokens)
            assert caught.value.retry_after_s

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), tokens=st.integers(1, 80))
    def tokenized(self, data: st.DataObject, tokens: int) -> None:
        ticket = data.draw(st.sampled_from(list(self.waiting)))
        ticket.correct(tokens)
        self.waiting[ticket] = tokens

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), again=st.booleans())
    def start(self, data: st.DataObject, again: bool) -> None:
        ticket = data.draw(st.sampled_from(list(self.waiting)))
        del self.waiting[ticket]
        self.running.append(ticket)
        for _ in range(1 + again):  # a resumed request starts again
            ticket.started()

    @precondition(lambda self: self.waiting or self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from([*self.waiting, *self.running]))
        if self.waiting.pop(ticket, None) is None:
            self.running.remove(ticket)
        with pytest.raises(KeyError), ticket:
            raise KeyError("whatever ends a call")

    @invariant()
    def counts_are_true(self) -> None:
        assert self.admission.waiting_requests == len(self.waiting)
        assert self.admission.waiting_tokens == sum(self.waiting.values())
        assert self.admission.streams == len(self.waiting) + len(self.running)


TestAdmission = AdmissionMachine.TestCase


def test_nobody_gets_in_while_it_drains() -> None:
    told: list[str] = []
    admission = Admission(max_requests=1, max_tokens=1, max_streams=1, on_reject=told.append)
    admission.drain()
    with pytest.raises(UnavailableError) as caught:
        admission.admit(1)
    assert isinstance(caught.value, ServeError)
    assert (caught.value.reason, told) == ("DRAINING", ["DRAINING"])


@pytest.mark.parametrize("gateways", [1, 2, 3, 7])
@pytest.mark.parametrize("limit", [7, 8, 1024])
def test_the_parts_of_a_limit_add_up_to_it(limit: int, gateways: int) -> None:
    parts = [part_of(limit, number, gateways) for number in range(gateways)]
    assert sum(parts) == limit
    assert 1 <= min(parts) <= max(parts) <= min(parts) + 1
