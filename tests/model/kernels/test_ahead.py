"""Processes that compile ahead, with something else in the place of compiling (test_compiling.py has the compiler)."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model.errors import ModelError
from model.kernels import ahead
from tests.processes import until

KERNELS = 20


class Kernel:
    """Is compiled by writing which process did so; a broken one cannot be."""

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / name
        self.name = name

    def in_cache(self) -> bool:
        return self._file.exists()

    def compile(self) -> None:
        if self.name == "broken":
            raise RuntimeError("it does not compile")
        time.sleep(0.01)
        self._file.write_text(str(os.getpid()))


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Kernel]:
    made = [Kernel(tmp_path, str(number)) for number in range(KERNELS)]

    @contextmanager
    def tried() -> Iterator[dict[Any, Any]]:
        yield {kernel.name: kernel for kernel in made}

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(ahead, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    monkeypatch.setattr(ahead, "_launches_tried", tried)
    return made


def compile_ahead(**options: Any) -> list[tuple[int, int]]:
    """What was told of progress; nothing of this process may be left behind."""
    told: list[tuple[int, int]] = []
    files, processes = set(os.listdir("/proc/self/fd")), children()
    options = {"processes": 3, "settle": lambda: None} | options
    ahead.compile_ahead(lambda: None, progress=lambda done, total: told.append((done, total)), **options)
    assert set(os.listdir("/proc/self/fd")) == files
    assert children() == processes
    return told


def children() -> set[str]:
    """This process's own, those that have ended and nobody has waited for among them."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.add(process.name)
    return found


def compilers(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.iterdir() if file.name.isdigit()]


def test_several_processes_compile_all(kernels: list[Kernel], tmp_path: Path) -> None:
    def settle() -> None:
        """Nobody begins before all are there, so that none can do it alone."""
        (tmp_path / f"there-{os.getpid()}").touch()
        until(lambda: len(list(tmp_path.glob("there-*"))) == 3, 30.0, "not all processes came")

    told = compile_ahead(settle=settle)
    assert len(compilers(tmp_path)) == KERNELS
    assert 1 < len(set(compilers(tmp_path))) <= 3  # one may have come late all the same
    assert os.getpid() not in compilers(tmp_path)
    assert told[0] == (0, KERNELS)
    assert told[-1] == (KERNELS, KERNELS)
    assert told == sorted(told)


@pytest.mark.parametrize("begin", [0.0, 0.5, 0.99])
def test_others_begin_elsewhere(
    kernels: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: float
) -> None:
    order = tmp_path / "order"

    def note(kernel: Kernel) -> None:
        with order.open("a") as file:
            file.write(f"{kernel.name} ")

    monkeypatch.setattr(Kernel, "compile", note)
    compile_ahead(processes=2, begin=begin)
    numbers = [int(number) for number in order.read_text().split()]
    first = int(begin * KERNELS)
    assert numbers[0] in {first, (first + 1) % KERNELS}, "one of two processes was there first"
    assert sorted(numbers) == list(range(KERNELS))


def test_what_cannot_be_compiled_stops_nothing(
    kernels: list[Kernel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.insert(3, Kernel(tmp_path, "broken"))
    with caplog.at_level(logging.WARNING):
        told = compile_ahead()
    assert len(compilers(tmp_path)) == KERNELS
    assert told[-1] == (KERNELS + 1, KERNELS + 1)
    assert caplog.messages[-1] == "compiling kernels ahead failed in 1 processes"


@pytest.mark.parametrize("forks", [0, 1])
def test_without_more_processes_fewer_compile(
    kernels: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forks: int
) -> None:
    fork, left = os.fork, forks

    def limited() -> int:
        nonlocal left
        if left == 0:
            raise BlockingIOError("Resource temporarily unavailable")
        left -= 1
        return fork()

    monkeypatch.setattr(os, "fork", limited)
    compile_ahead()
    assert len(set(compilers(tmp_path))) == forks
    assert len(compilers(tmp_path)) == forks * KERNELS
    assert caplog.messages[0] == f"{forks} of 3 processes compile kernels: Resource temporarily unavailable"


def test_a_process_that_is_killed_loses_its_kernel_only(kernels: list[Kernel], tmp_path: Path) -> None:
    def die_once() -> None:
        try:
            (tmp_path / "died").touch(exist_ok=False)
        except FileExistsError:
            return
        os._exit(9)

    told = compile_ahead(settle=die_once)
    assert len(compilers(tmp_path)) == KERNELS
    assert told[-1] == (KERNELS, KERNELS)


def test_nothing_is_forked_where_all_is_there(kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[str] = []

    def in_cache(kernel: Kernel) -> bool:
        there.append(kernel.name)
        return True

    monkeypatch.setattr(Kernel, "in_cache", in_cache)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert compile_ahead() == []
    assert len(there) == KERNELS
    monkeypatch.setattr(Kernel, "in_cache", lambda kernel: False)
    assert compile_ahead(processes=1) == []


def test_a_cache_that_cannot_be_written_is_told(kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Kernel) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", "/cache/triton/AB")

    monkeypatch.setattr(Kernel, "in_cache", refuse)
    with pytest.raises(ModelError, match=r"compiled kernels: /cache/triton/AB: Permission denied; .* TRITON_CACHE_DIR"):
        compile_ahead()


def test_a_cache_that_fills_up_meanwhile_is_told(
    kernels: list[Kernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, compile_one = 7, Kernel.compile

    def fill(kernel: Kernel) -> None:
        if int(kernel.name) >= room:
            raise OSError(errno.ENOSPC, "No space left on device", "/cache/triton/AB")
        compile_one(kernel)

    monkeypatch.setattr(Kernel, "compile", fill)
    files, processes = set(os.listdir("/proc/self/fd")), children()
    with pytest.raises(ModelError, match=r"compiled kernels: /cache/triton/AB: No space left .* TRITON_CACHE_DIR"):
        compile_ahead()
    assert (set(os.listdir("/proc/self/fd")), children()) == (files, processes)
    assert len(compilers(tmp_path)) == room


def test_what_else_cannot_be_read_is_not_blamed_on_the_cache(
    kernels: list[Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(_: Kernel) -> bool:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "gcc")

    monkeypatch.setattr(Kernel, "in_cache", lack)
    with pytest.raises(FileNotFoundError):
        compile_ahead()
