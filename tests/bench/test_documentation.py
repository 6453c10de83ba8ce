"""What the documentation tells people to type."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bench.load.options import EPILOG, LoadOptions
from service.cli import build_parser

SAMPLING = "--temperature 0.6 --top-k 0 --top-p 1"


def commands(root: Path) -> list[str]:
    texts = [EPILOG, *((root / name).read_text() for name in ("README.md", "docs/benchmarking.md"))]
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [
        line.strip()
        for line in lines
        if line.strip().startswith(("lightqwen bench -", "lightqwen bench $")) and "--help" not in line
    ]


def test_every_command_that_is_shown_is_understood(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands(root)
    assert len(shown) >= 8
    assert f'sampling="{SAMPLING}"' in (root / "docs/benchmarking.md").read_text()
    for command in shown:
        words = shlex.split(command.replace("$sampling", SAMPLING), comments=True)
        LoadOptions.of(build_parser().parse_args(words[1:]))
