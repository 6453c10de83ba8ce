"""What the documentation tells people to type, and where its links lead."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pytest

from bench.load.options import EPILOG, LoadOptions
from service.cli import build_parser
from service.config import load_config

SAMPLING = "--temperature 0.6 --top-k 0 --top-p 1"
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "helm/lightqwen/README.md", *sorted((root / "docs").glob("*.md"))]


def commands(texts: Iterable[str], name: str) -> list[list[str]]:
    """The words after `lightqwen NAME` wherever a line of its own shows how to call it, maybe after a prompt."""
    lines = "\n".join(texts).replace("\\\n", " ").replace("$sampling", SAMPLING).splitlines()
    shown = [re.fullmatch(rf"\s*(?:[\w ]*\$ )?lightqwen {name}\b(.*)", line) for line in lines]
    return [shlex.split(match[1], comments=True) for match in shown if match and "`" not in match[1]]


def test_every_bench_command_that_is_shown_is_understood(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = commands([EPILOG, *(page.read_text() for page in pages(root))], "bench")
    assert len(shown) >= 8
    assert f'sampling="{SAMPLING}"' in (root / "docs/benchmarking.md").read_text()
    for words in shown:
        LoadOptions.of(build_parser().parse_args(["bench", *words]))


def test_every_other_command_that_is_shown_is_understood(root: Path) -> None:
    texts = [page.read_text() for page in pages(root)]
    served = commands(texts, "serve")
    assert len(served) >= 6
    for words in served:
        load_config(words)
    for name in ("generate", "chat"):
        shown = commands(texts, name)
        assert shown
        for words in shown:
            build_parser().parse_args([name, *words])


def test_every_link_leads_somewhere(root: Path) -> None:
    followed = 0
    for page in pages(root):
        for target in LINK.findall(page.read_text()):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {target}"
            if anchor:
                headings = [_anchor(heading) for heading in HEADING.findall(there.read_text())]
                assert anchor in headings, f"{page.name}: {target}"
            followed += 1
    assert followed >= 30


def _anchor(heading: str) -> str:
    """As GitHub names it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
