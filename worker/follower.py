"""Every rank but the first: replay the leader's plans in order, nothing else. It decides nothing, answers nobody."""

from __future__ import annotations

from collections.abc import Callable

from worker.channel import PlanReceiver
from worker.leader import REPORT_S
from worker.plan import StepPlan
from worker.runner import Runner


class Follower:
    """Replays plans on its own runner, as far ahead of its device as the leader is."""

    def __init__(
        self, runner: Runner, plans: PlanReceiver, *, run_ahead: int, heartbeat: Callable[[int], None]
    ) -> None:
        self._runner = runner
        self._plans = plans
        self._run_ahead = run_ahead
        self._heartbeat = heartbeat
        self._steps = 0

    def step(self) -> None:
        """One turn: a plan if one comes in time."""
        frame = self._plans.receive(REPORT_S)
        if frame is not None:
            self._runner.launch(StepPlan.decode(frame))
            if self._runner.num_in_flight >= self._run_ahead:
                self._runner.collect()  # every rank draws the same tokens; the leader reports them
                self._steps += 1
        self._heartbeat(self._steps)
