"""What the command that compiles without a GPU says of wrong arguments (test_compiling.py has it compile)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from model.kernels import shipped
from model.published import write_config
from worker import compile


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's own Triton stays as it is."""
    monkeypatch.setattr(shipped, "compile_nowhere", lambda into: None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name a shape, such as 0.6B or 32B/2, or a folder by --model"),
        (["7B"], "'7B' is none of 0.6B, 1.7B, 4B, 8B, 14B, 32B, nor such a one with /2, /4 or /8"),
        (["8B/3"], "'8B/3' is none of"),
        (["8B", "--set", "dtype"], "--set: 'dtype' is not of the form OPTION=VALUE"),
        (["8B", "--set", "dtyp=float16"], "--dtyp: no such option"),
        (["8B", "--set", "attention_backend=flash"], "attention_backend=flash: only with triton"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "SHAPE", "--set", "tensor_parallel_size=3"], "3"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = str(write_config("0.6B", tmp_path / "shape"))
    given = [shape if argument == "SHAPE" else argument for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["worker.compile", *given, "--into", str(tmp_path / "kernels")])
    with pytest.raises(SystemExit) as ended:
        compile.main()
    assert ended.value.code in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error
    assert says in error


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["worker.compile", "8B", "--into", str(tmp_path / "file" / "kernels")])
    with pytest.raises(SystemExit):
        compile.main()
    assert capsys.readouterr().err.endswith("kernels: Not a directory; name another folder by --into\n")
