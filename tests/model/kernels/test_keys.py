"""What a kernel is called in Triton's cache depends on nothing but the kernel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

HELPED = "model.kernels.peer_sum:_one_shot_kernel"  # helpers of which read a constant
ALSO_HELPED = "model.kernels.embedding:_embed_kernel"  # by one of these
PRINT_LAST_KEY = """
import importlib, sys
for name in sys.argv[1:]:
    module, function = name.split(":")
    key = getattr(importlib.import_module(module), function).cache_key
print(key)
"""


def test_no_key_depends_on_what_was_compiled_before() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def key(*names: str) -> str:
        command = [sys.executable, "-c", PRINT_LAST_KEY, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert key(HELPED) == key(ALSO_HELPED, HELPED)
