"""A plan arrives at a follower as the leader made it, or not at all."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.messages import MAX_STOP_IDS
from worker.plan import ADMISSION, VERSION, StepPlan

int32 = st.integers(-(2**31), 2**31 - 1)


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows = draw(st.integers(0, 6))
    decode_rows = draw(st.integers(0, rows))
    records = draw(st.lists(st.binary(min_size=ADMISSION.itemsize, max_size=ADMISSION.itemsize), max_size=3))
    return StepPlan(
        step=draw(st.integers(0, 2**63 - 1)),
        slots=np.array(draw(st.lists(int32, min_size=rows, max_size=rows)), np.int32),
        query_lens=np.array(draw(st.lists(st.integers(1, 2**20), min_size=rows, max_size=rows)), np.int32),
        num_decode_rows=decode_rows,
        max_query_len=draw(int32),
        max_kv_len=draw(int32),
        block_updates=np.array(draw(st.lists(st.tuples(int32, int32, int32), max_size=5)), np.int32).reshape(-1, 3),
        admissions=np.frombuffer(b"".join(records), ADMISSION),
        admitted_ids=np.array(draw(st.lists(int32, max_size=20)), np.int32),
    )


@given(plan=plans())
@settings(max_examples=100, deadline=None)
def test_decoding_undoes_encoding(plan: StepPlan) -> None:
    copy = StepPlan.decode(plan.encode())
    for name in ("step", "num_decode_rows", "max_query_len", "max_kv_len"):
        assert getattr(copy, name) == getattr(plan, name)
    for name in ("slots", "query_lens", "block_updates", "admissions", "admitted_ids"):
        sent, arrived = getattr(plan, name), getattr(copy, name)
        assert arrived.dtype == sent.dtype
        assert arrived.shape == sent.shape
        assert arrived.tobytes() == sent.tobytes()  # bit for bit: NaN payloads compare unequal to themselves
    assert copy.num_rows == plan.num_rows
    assert copy.num_tokens == plan.num_tokens
    assert copy.num_single_rows == plan.num_single_rows == plan.query_lens.tolist().count(1)
    assert copy.is_decode == plan.is_decode


def small_plan(**changes: object) -> StepPlan:
    fields: dict[str, object] = {
        "step": 7,
        "slots": np.array([3, 1], np.int32),
        "query_lens": np.array([1, 1], np.int32),
        "num_decode_rows": 2,
        "max_query_len": 1,
        "max_kv_len": 9,
        "block_updates": np.empty((0, 3), np.int32),
        "admissions": np.empty(0, ADMISSION),
        "admitted_ids": np.empty(0, np.int32),
    }
    return StepPlan(**(fields | changes))  # type: ignore[arg-type]


def test_a_frame_of_another_version_is_refused() -> None:
    frame = bytearray(small_plan().encode())
    assert frame[:4] == VERSION.to_bytes(4, "little")
    frame[:4] = (VERSION + 1).to_bytes(4, "little")
    with pytest.raises(ValueError, match=rf"version {VERSION + 1}.*reads version {VERSION}"):
        StepPlan.decode(bytes(frame))


@pytest.mark.parametrize("missing", [1, 4, 8, 40])
def test_a_frame_that_was_cut_is_refused(missing: int) -> None:
    with pytest.raises(ValueError, match="buffer"):
        StepPlan.decode(small_plan().encode()[:-missing])


def test_only_decode_rows_make_a_decode_step() -> None:
    assert small_plan().is_decode
    assert not small_plan(num_decode_rows=1).is_decode


def test_an_admission_holds_as_many_stop_ids_as_a_request_may_have() -> None:
    assert ADMISSION["stop_ids"].shape == (MAX_STOP_IDS,)
