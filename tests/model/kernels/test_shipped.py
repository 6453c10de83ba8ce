"""Where kernels are looked for that were compiled before (test_compiling.py has the compiler)."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import ModelError
from model.kernels import shipped

triton = pytest.importorskip("triton")

KEY = "ab" * 32


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The cache, and what is shipped, in which something is."""
    cache, behind = tmp_path / "cache", tmp_path / "shipped"
    monkeypatch.setenv("LIGHTQWEN_KERNELS", str(behind))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(behind))
    entry = triton.runtime.cache.get_cache_manager(KEY)
    entry.put_group("kernel.json", {name: entry.put(name, name) for name in ("kernel.cubin", "kernel.json")})
    monkeypatch.setattr(triton.knobs.cache, "dir", str(cache))
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    shipped.use_shipped()
    return cache, behind


def test_what_the_cache_lacks_is_found_where_it_was_shipped(folders: tuple[Path, Path]) -> None:
    cache, behind = folders
    entry = triton.runtime.cache.get_cache_manager(KEY)
    group = entry.get_group("kernel.json")
    assert group is not None
    assert {name: Path(path).read_text() for name, path in group.items()} == {name: name for name in group}
    assert len(group) == 2
    assert all(Path(path).is_relative_to(behind) for path in group.values())
    assert Path(entry.get_file("kernel.cubin")).is_relative_to(behind)
    assert entry.get_file("other.cubin") is None
    other = triton.runtime.cache.get_cache_manager("cd" * 32)
    assert other.get_group("kernel.json") is None
    assert not [file for file in cache.rglob("*") if file.is_file()]


def test_what_is_compiled_goes_to_the_cache_and_comes_first(folders: tuple[Path, Path]) -> None:
    cache, behind = folders
    before = sorted(behind.rglob("*"))
    entry = triton.runtime.cache.get_cache_manager(KEY)
    path = entry.put("newer", "kernel.cubin")
    assert entry.get_file("kernel.cubin") == path
    assert Path(path).is_relative_to(cache)
    assert sorted(behind.rglob("*")) == before


def test_a_folder_that_is_not_there_is_an_error_if_it_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "manager_class", None)
    monkeypatch.setenv("LIGHTQWEN_KERNELS", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"LIGHTQWEN_KERNELS: .*none is no folder"):
        shipped.use_shipped()
    monkeypatch.delenv("LIGHTQWEN_KERNELS")
    monkeypatch.setattr(shipped.sys, "prefix", str(tmp_path))
    shipped.use_shipped()
    assert triton.knobs.cache.manager_class is None, "nobody looks for what is not there"
