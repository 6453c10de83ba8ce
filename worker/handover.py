"""The host's memory in which a GPU finds its steps' input, and leaves their tokens.

Copies to the device and back would stand around each step: the device waits for one to end before it begins a graph,
and for the graph before it begins the other. Here a step's first kernel reads its input where the host has written it,
and its last one writes the tokens where the host reads them; in between is the step alone.

There is a place for each step in flight, and steps take them in turn. A captured step has the arguments that it was
captured with, so it cannot be told its place: the device counts, as the host does. The step's first kernel (`fetch` in
`worker/table_kernels.py`) notes whose turn it is, and the last one (`retire`) passes the turn on. Therefore every step
has both, and what takes a place on the host must be launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FETCHED_WORDS = 1024
"""Inputs are fetched in pieces of so many words, whole ones, so that a thread can read 16 bytes at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """The host's memory for one step in flight."""

    input: torch.Tensor  # [words] int32, pinned
    tokens: torch.Tensor  # [rows] int32, pinned
    done: torch.cuda.Event | None  # recorded behind the step, on a GPU: its input has been read, its tokens are there


class Handover:
    """Places for steps, and whose turn it is.

    Args:
        num_places: more than steps in flight, since what was collected last may still be read.
        num_words: of the largest input of a step.
        num_rows: of the largest step.
        device: whose steps these are.
    """

    def __init__(self, *, num_places: int, num_words: int, num_rows: int, device: torch.device) -> None:
        pinned = device.type == "cuda"

        def on_host(width: int) -> torch.Tensor:
            return torch.zeros((num_places, width), dtype=torch.int32, pin_memory=pinned)

        whole = -(-num_words // FETCHED_WORDS) * FETCHED_WORDS
        self.inputs = on_host(whole)
        """[places, words] int32, in the host's memory, which the device reads."""
        self.tokens = on_host(num_rows)
        """[places, rows] int32, in the host's memory, which the device writes."""
        self.input = torch.zeros(whole, dtype=torch.int32, device=device)
        """[words] int32: a step's input, once its first kernel has run."""
        self.turn = torch.zeros(2, dtype=torch.int32, device=device)
        """The place of the next step to begin, and of the one that has begun. No kernel reads the number that it
        writes, so that it does not matter in which order its programs do."""
        self._places = [
            Place(words, tokens, torch.cuda.Event() if pinned else None)  # type: ignore[no-untyped-call]
            for words, tokens in zip(self.inputs, self.tokens, strict=True)
        ]
        self._next = 0

    def take_place(self) -> Place:
        """Return the next step's place. The step must be launched, and no other before it."""
        place = self._places[self._next]
        self._next = (self._next + 1) % len(self._places)
        return place
