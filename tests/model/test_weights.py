"""Loading: every way in which a checkpoint can be wrong has its line, and a rank reads what it needs and no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import CheckpointTensor, open_checkpoint
from model.config import Qwen3Config
from model.errors import ModelError
from model.layers import Shard
from model.parallel import TensorParallel
from model.qwen3 import Qwen3ForCausalLM
from model.weights import checkpoint_shards
from tests.model.helpers import PagedCache, PagedSequence, load, random_ids, run, save_checkpoint, unpack

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_checkpoint: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint[0], tmp_path / "checkpoint"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def spoil_missing(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(UP_PROJ))


def spoil_extra(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 48)}))


def spoil_shape(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({UP_PROJ: torch.zeros(95, 48)}))


def spoil_dtype(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.update({UP_PROJ: torch.zeros(96, 48, dtype=torch.int8)}))


def spoil_truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def spoil_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def spoil_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def spoil_bias_in_config(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "attention_bias": True}))


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (spoil_missing, [f"tensor {UP_PROJ} is missing, shape [96, 48] expected"]),
        (spoil_extra, ["model.safetensors: tensor model.layers.2.mlp.up_proj.weight of shape [96, 48] is not part"]),
        (spoil_shape, [f"model.safetensors: tensor {UP_PROJ} has shape [95, 48]", "asks for [96, 48]"]),
        (spoil_dtype, [f"model.safetensors: tensor {UP_PROJ} is I8"]),
        (spoil_truncated, ["model.safetensors: not a readable safetensors file", "download it again"]),
        (spoil_lfs_pointer, ["model.safetensors: not a readable safetensors file", "Git LFS pointer"]),
        (spoil_none, ["holds neither model.safetensors nor model.safetensors.index.json"]),
        (spoil_pickle_only, ["pickle files (pytorch_model.bin)", "never opened"]),
        (spoil_bias_in_config, ["k_proj.bias is missing (and 7 more)"]),
        (lambda folder: write_index(folder, {"weight_map": {"a": "b.safetensors"}}), ["b.safetensors: no such file"]),
        (lambda folder: write_index(folder, []), ["not an index of safetensors files"]),
        (lambda folder: write_index(folder, {"weight_map": {"a": "../b.safetensors"}}), ["lists '../b.safetensors'"]),
        (lambda folder: write_index(folder, {"weight_map": {"a": "pytorch_model.bin"}}), ["lists 'pytorch_model.bin'"]),
    ],
)
def test_spoiled_checkpoints(folder: Path, spoil: Callable[[Path], None], parts: list[str]) -> None:
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_missing_and_doubled_shards(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    kept = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=f"is in both {first.name} and {second.name}"):
        load(tmp_path)
    second.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ModelError, match=f"{second.name}: not a readable safetensors file"):
        load(tmp_path)
    second.unlink()
    with pytest.raises(ModelError, match=f"{second.name}: no such file, but model.safetensors.index.json lists it"):
        load(tmp_path)


def test_no_memory_is_taken_for_a_wrong_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Qwen3ForCausalLM, device: torch.device) -> None:
        raise AssertionError("memory was taken before the checkpoint was checked")

    monkeypatch.setattr(Qwen3ForCausalLM, "materialize", refuse)
    spoil_shape(folder)
    with pytest.raises(ModelError, match="has shape"):
        load(folder)


def test_names_of_the_bare_model_and_leftovers(tmp_path: Path) -> None:
    """A tied checkpoint may lack the `model.` prefix, hold lm_head all the same, and carry old rotary buffers."""
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = torch.zeros(101, 48)
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    edit(tmp_path, rename)
    actual = unpack(load(tmp_path))
    for name, parameter in unpack(expected).state_dict().items():
        assert torch.equal(actual.state_dict()[name], parameter)


def test_reads_only_its_slices(tiny_checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reference = tiny_checkpoint
    read: dict[str, tuple[int, ...]] = {}
    original = CheckpointTensor.read

    def record(self: CheckpointTensor, source: tuple[slice, ...]) -> torch.Tensor:
        values = original(self, source)
        read[self.name] = tuple(values.shape)
        return values

    monkeypatch.setattr(CheckpointTensor, "read", record)
    model = unpack(load(folder, tp=TensorParallel(rank=3, size=4)))  # loading needs no group
    assert read["model.layers.0.self_attn.q_proj.weight"] == (16, 48)
    assert read["model.layers.0.self_attn.k_proj.weight"] == (16, 48)  # one whole KV head, shared with rank 2
    assert read["model.layers.0.self_attn.o_proj.weight"] == (48, 16)
    assert read["model.layers.0.mlp.gate_proj.weight"] == (24, 48)
    assert read["model.layers.0.mlp.down_proj.weight"] == (48, 24)
    assert read["lm_head.weight"] == (23, 48)  # 101 = 3 * 26 + 23
    theirs = reference.state_dict()
    up = theirs["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.gate_up_proj.weight[24:], up[72:])
    value = theirs["model.layers.0.self_attn.v_proj.weight"]
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight[32:], value[16:])


def test_progress(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, max_shard_size="20KB")
    calls: list[tuple[int, int]] = []
    model = load(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert {of for _, of in calls} == {total}
    assert calls[-1][0] == total


def test_converts_dtype(tiny_checkpoint: tuple[Path, Any]) -> None:
    folder, reference = tiny_checkpoint
    model = load(folder, dtype=torch.bfloat16)
    expected = reference.lm_head.weight.to(torch.bfloat16)
    assert torch.equal(unpack(model).lm_head.weight, expected)
    assert model.model.rotary_emb.cos_sin.dtype == torch.float32


def test_random_weights_are_the_same_for_every_parallel_size(tiny_checkpoint: tuple[Path, Any]) -> None:
    folder, _ = tiny_checkpoint
    whole = checkpoint_shards(unpack(load(folder, load_format="random")))
    for size in (2, 4):
        for rank in range(size):
            model = load(folder, load_format="random", tp=TensorParallel(rank=rank, size=size))
            for name, shard in checkpoint_shards(unpack(model)).items():
                assert torch.equal(shard.target, whole[name].target[shard.source]), name


def test_random_weights_make_sensible_logits(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, attention_bias=True)
    (tmp_path / "model.safetensors").unlink()  # only config.json is needed
    model = load(tmp_path, load_format="random")
    [logits] = run(model, PagedCache(model.config), [(PagedSequence(), random_ids(40))])
    assert 0.5 < logits.std() < 2.0
    assert not torch.equal(*(unpack(model).model.layers[i].mlp.down_proj.weight for i in (0, 1)))


def test_every_checkpoint_tensor_has_one_place(tiny_checkpoint: tuple[Path, Any]) -> None:
    """The shards bear the checkpoint's names, and together they fill every parameter exactly once."""
    folder, _ = tiny_checkpoint
    model = unpack(load(folder))
    shards: dict[str, Shard] = checkpoint_shards(model)
    assert shards.keys() == open_checkpoint(folder).keys()
    for parameter in model.parameters():
        parameter.zero_()
    for shard in shards.values():
        shard.target.add_(1)
    assert all(torch.equal(parameter, torch.ones_like(parameter)) for parameter in model.parameters())


def test_meta_model_takes_no_memory_until_materialized(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tie_word_embeddings=True)
    config = Qwen3Config.from_folder(tmp_path)
    model = Qwen3ForCausalLM(
        config,
        load(tmp_path).model.layers[0].self_attn.attn,
        max_model_len=64,
        tp=TensorParallel.single(),
        dtype=torch.float32,
        device=torch.device("meta"),
    )
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.materialize(torch.device("cpu"))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.model.rotary_emb.cos_sin, load(tmp_path, max_model_len=64).model.rotary_emb.cos_sin)


def test_parallel_size_is_checked(tiny_checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(ModelError, match="size 3 does not divide the model's 4 query heads"):
        load(tiny_checkpoint[0], tp=TensorParallel(rank=0, size=3))
