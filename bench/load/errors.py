"""Why a benchmark cannot run."""

from __future__ import annotations


class LoadError(Exception):
    """It cannot be run as asked: one readable line that names what is wrong, and what would mend it."""
