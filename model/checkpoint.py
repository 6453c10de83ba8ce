"""The safetensors files of a checkpoint folder: which tensors there are, and slices of them. Nothing else is opened.

Formats based on pickle (.bin, .pt, .pth) can run code when they are read; here they are never read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.errors import ModelError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor on disk; its values are read when a slice is asked for, and no more of them than the slice."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it
    _slices: Any

    def read(self, source: tuple[slice, ...]) -> torch.Tensor:
        """Return that part of the tensor, on the CPU, in the file's dtype.

        Raises:
            ModelError: the file cannot be read.
        """
        try:
            return self._slices[source]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.file}: tensor {self.name} cannot be read ({error}); download it again") from error


def open_checkpoint(folder: Path) -> dict[str, CheckpointTensor]:
    """Open the folder's safetensors files and return their tensors by name, as Qwen3ForCausalLM calls them.

    A checkpoint of the bare Qwen3Model, whose names lack the `model.` in front, is understood too.

    Raises:
        ModelError: there are none, or one is missing or damaged.
    """
    tensors: dict[str, CheckpointTensor] = {}
    for file in _files(folder):
        for tensor in _open_file(file):
            if (other := tensors.get(tensor.name)) is not None:
                raise ModelError(f"{folder}: tensor {tensor.name} is in both {other.file.name} and {file.name}")
            tensors[tensor.name] = tensor
    return tensors


def _files(folder: Path) -> list[Path]:
    """The files that the index lists, or the only one where there is no index."""
    index = folder / _INDEX
    if index.exists():
        return [folder / name for name in _indexed_names(index)]
    single = folder / _SINGLE
    if single.exists():
        return [single]
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        raise ModelError(
            f"{folder}: the weights are in pickle files ({pickles[0]}), which are never opened; convert them to "
            f"safetensors"
        )
    raise ModelError(f"{folder}: holds neither {_SINGLE} nor {_INDEX}; download the checkpoint again")


def _indexed_names(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not an index of safetensors files ({error!r}); download it again") from error
    for name in names:
        # The index comes from outside: it may name files of its own folder, no other path and no other format.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index}: lists {name!r}, which is not the name of a safetensors file in its folder")
    return sorted(names)


def _open_file(file: Path) -> list[CheckpointTensor]:
    try:
        reader = safe_open(file, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file, but {_INDEX} lists it; download it again") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file}: not a readable safetensors file ({error}); download it again (an unfinished download and a Git "
            f"LFS pointer look like this)"
        ) from error
    tensors = []
    for name in reader.keys():  # noqa: SIM118 (a reader is not a mapping)
        slices = reader.get_slice(name)
        if slices.get_dtype() not in _DTYPES:
            raise ModelError(
                f"{file}: tensor {name} is {slices.get_dtype()}; only {', '.join(_DTYPES)} are supported, use the "
                f"unquantized checkpoint"
            )
        shape = tuple(slices.get_shape())
        tensors.append(CheckpointTensor(_full_name(name), file, shape, slices.get_dtype(), slices))
    return tensors


def _full_name(name: str) -> str:
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"
