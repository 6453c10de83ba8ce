"""Sampling with the rows shared out over gloo processes: the tokens of every rank sampling every row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model import share_rank


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all ranks once, for all cases and sizes."""
    root = tmp_path_factory.mktemp("shares")
    torch.multiprocessing.spawn(
        share_rank.main, args=(str(root / "rendezvous"), str(root)), nprocs=share_rank.WORLD_SIZE
    )
    return root


@pytest.mark.parametrize("size", share_rank.SIZES)
@pytest.mark.parametrize("number", range(len(share_rank.CASES)), ids=["-".join(map(str, c)) for c in share_rank.CASES])
def test_shares_change_neither_a_logit_nor_a_token(results: Path, number: int, size: int) -> None:
    rows, vocab_size, _ = share_rank.CASES[number]
    share = -(-rows // size)
    shares = []
    for rank in range(size):
        drawn = {
            name.partition("-")[2]: tensor
            for name, tensor in load_file(results / f"{size}-{rank}.safetensors").items()
            if name.startswith(f"{number}-")
        }
        assert drawn["share"].shape == (share, vocab_size)
        assert drawn["shared"].dtype is torch.int32
        assert torch.equal(drawn["shared"], drawn["whole"])
        assert ((drawn["whole"] >= 0) & (drawn["whole"] < vocab_size)).tolist() == [
            row != share_rank.BROKEN_ROW for row in range(rows)
        ]
        shares.append(drawn["share"])
    together = torch.cat(shares)
    torch.testing.assert_close(together[:rows], drawn["logits"], rtol=0, atol=0, equal_nan=True)
    assert not together[rows:].any()


def test_all_kinds_of_slots_are_drawn_from(results: Path) -> None:
    """Else equal tokens would show little: rows differ, and others than the highest logits win."""
    drawn = load_file(results / "1-0.safetensors")
    number = share_rank.CASES.index((8, 101, torch.float32))
    tokens, logits = drawn[f"{number}-whole"], drawn[f"{number}-logits"]
    usable = tokens >= 0
    assert len(set(tokens.tolist())) > 4
    assert (tokens != logits.argmax(-1))[usable].any()
