"""A plan: what the leader decided for one step, as a few KB of integers that every rank replays.

On the wire it is one frame: a header, then the arrays one after the other. Both ends run the same code from the same
installation; `VERSION` catches the case that they do not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from worker.messages import MAX_STOP_IDS

VERSION = 1
_HEADER = np.dtype(
    [
        ("version", "<i4"),
        ("step", "<i8"),
        ("rows", "<i4"),
        ("decode_rows", "<i4"),
        ("updates", "<i4"),
        ("admissions", "<i4"),
        ("ids", "<i4"),
        ("max_query_len", "<i4"),
        ("max_kv_len", "<i4"),
    ]
)

ADMISSION = np.dtype(
    [
        ("slot", "<i4"),
        ("num_ids", "<i4"),  # all known tokens: the prompt, and the output so far of a resumed sequence
        ("num_prompt", "<i4"),
        ("num_cached", "<i4"),  # tokens whose keys and values are in the KV cache already
        ("max_length", "<i4"),
        ("min_length", "<i4"),
        ("top_k", "<i4"),
        ("penalizes", "<i4"),
        ("seed", "<i8"),
        ("temperature", "<f4"),
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("presence", "<f4"),
        ("frequency", "<f4"),
        ("repetition", "<f4"),
        ("stop_ids", "<i4", (MAX_STOP_IDS,)),  # padded with -1
    ]
)
"""What a slot's row in the device tables starts with."""

NO_ADMISSION = np.zeros(1, ADMISSION)
NO_ADMISSION["slot"] = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBounds:
    """How large a step is; for a captured one, how large it can be."""

    num_tokens: int
    num_decode_rows: int  # rows at the front that are known to have one query
    max_single_rows: int  # at most so many rows have one query, those at the front included
    max_chunk_rows: int  # at most so many rows have more than one
    max_query_len: int
    max_kv_len: int


@dataclass(slots=True, kw_only=True)
class StepPlan:
    """Rows of one query come first (`num_decode_rows` of them), then the prefill chunks."""

    step: int
    slots: np.ndarray  # [rows] int32
    query_lens: np.ndarray  # [rows] int32
    num_decode_rows: int
    max_query_len: int
    max_kv_len: int
    block_updates: np.ndarray  # [updates, 3] int32: slot, index in its block table, block
    admissions: np.ndarray  # [admissions] ADMISSION
    admitted_ids: np.ndarray  # [sum of num_ids] int32
    num_tokens: int = field(init=False)
    num_single_rows: int = field(init=False)  # decodes, and chunks of one token

    def __post_init__(self) -> None:  # once: the runner asks for these of each graph that may fit
        self.num_tokens = int(self.query_lens.sum())
        self.num_single_rows = int(np.count_nonzero(self.query_lens == 1))

    @property
    def num_rows(self) -> int:
        return len(self.slots)

    @property
    def bounds(self) -> StepBounds:
        return StepBounds(
            num_tokens=self.num_tokens,
            num_decode_rows=self.num_decode_rows,
            max_single_rows=self.num_single_rows,
            max_chunk_rows=self.num_rows - self.num_decode_rows,
            max_query_len=self.max_query_len,
            max_kv_len=self.max_kv_len,
        )

    @property
    def is_decode(self) -> bool:
        """Whether every row is a decode."""
        return self.num_decode_rows == self.num_rows

    def encode(self) -> bytes:
        header = np.array(
            (
                VERSION,
                self.step,
                self.num_rows,
                self.num_decode_rows,
                len(self.block_updates),
                len(self.admissions),
                len(self.admitted_ids),
                self.max_query_len,
                self.max_kv_len,
            ),
            dtype=_HEADER,
        )
        arrays = (header, self.slots, self.query_lens, self.block_updates, self.admissions, self.admitted_ids)
        return b"".join(array.tobytes() for array in arrays)

    @classmethod
    def decode(cls, frame: bytes) -> StepPlan:
        header = np.frombuffer(frame, _HEADER, 1)[0]
        if header["version"] != VERSION:
            raise ValueError(f"plan of version {header['version']}, this rank reads version {VERSION}")
        offset = _HEADER.itemsize

        def take(dtype: np.dtype | type, count: int) -> np.ndarray:
            nonlocal offset
            array = np.frombuffer(frame, dtype, count, offset)
            offset += array.nbytes
            return array

        rows = int(header["rows"])
        return cls(
            step=int(header["step"]),
            slots=take(np.int32, rows),
            query_lens=take(np.int32, rows),
            num_decode_rows=int(header["decode_rows"]),
            max_query_len=int(header["max_query_len"]),
            max_kv_len=int(header["max_kv_len"]),
            block_updates=take(np.int32, int(header["updates"]) * 3).reshape(-1, 3),
            admissions=take(ADMISSION, int(header["admissions"])),
            admitted_ids=take(np.int32, int(header["ids"])),
        )
