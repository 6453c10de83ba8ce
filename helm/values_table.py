"""Write the table of values in the chart's README.md from the comments in its values.yaml, or check that it is current.

A `# --` comment before a key describes it and everything below it. Every value must be described, by itself or by a key
above it: a value that nobody explains is an error.

    python helm/values_table.py            # write
    python helm/values_table.py --check    # exit with 1 if the table is not current
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "lightqwen"
BEGIN, END = "<!-- values: make chart-readme -->", "<!-- end of values -->"
KEY = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z][A-Za-z0-9_]*):(?P<rest>.*)$")
COMMENT = re.compile(r"^ *# (?:-- )?(?P<text>.*)$")


class TableError(Exception):
    """values.yaml or README.md is not as this script needs it."""


def descriptions(text: str) -> dict[tuple[str, ...], str]:
    """What each described key's comment says, by the key's path."""
    found: dict[tuple[str, ...], str] = {}
    path: list[str] = []
    comment: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("# --") or (comment and line.lstrip().startswith("#")):
            match = COMMENT.match(line)
            assert match is not None, line
            comment.append(match["text"])
        elif match := KEY.match(line):
            path = [*path[: len(match["indent"]) // 2], match["key"]]
            if comment:
                found[tuple(path)] = " ".join(comment)
            comment = []
        else:
            comment = []
    return found


def rows(values: dict[str, Any], described: dict[tuple[str, ...], str]) -> Iterator[tuple[str, str, str]]:
    """Path, default and description of every described value.

    Raises:
        TableError: a value is described nowhere.
    """

    def walk(path: tuple[str, ...], value: Any) -> Iterator[tuple[str, str, str]]:
        if path in described:
            default = json.dumps(value, ensure_ascii=False)
            yield ".".join(path), f"`{default}`", described[path].replace("|", "\\|")
        elif isinstance(value, dict) and value:
            for key, child in value.items():
                yield from walk((*path, key), child)
        else:
            raise TableError(f"values.yaml: {'.'.join(path)} has no `# --` comment")

    for key, value in values.items():
        yield from walk((key,), value)


def table(text: str) -> str:
    """The table, for the text of a values.yaml."""
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    lines += [
        f"| `{name}` | {default} | {meaning} |"
        for name, default, meaning in rows(yaml.safe_load(text), descriptions(text))
    ]
    return "\n".join(lines)


def with_table(readme: str, new: str) -> str:
    """The README with this table between its two marks.

    Raises:
        TableError: it has no such marks.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise TableError(f"README.md: no {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> int:
    path = CHART / "README.md"
    readme = path.read_text(encoding="utf-8")
    current = with_table(readme, table((CHART / "values.yaml").read_text(encoding="utf-8")))
    if "--check" in sys.argv[1:]:
        return int(current != readme)
    path.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
