"""The files of the demo checkpoint: a folder that transformers, and this server, load like any other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.demo.chat import END_OF_TEXT, END_OF_TURN, completion, prompt
from model.demo.data import training_question
from model.demo.network import EPSILON, Shape
from model.demo.tokenizer import added_id, tokenizer_config, train_tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
TOKENIZER_SEED = 1
TOKENIZER_DOCUMENTS = 20_000


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer on text of the skills, the same each time, and write its two files."""
    rng = Random(TOKENIZER_SEED)
    texts = []
    for _ in range(TOKENIZER_DOCUMENTS):
        question, thinking = training_question(rng), rng.random() < 0.5
        texts.append(prompt(question, thinking=thinking) + completion(question, thinking=thinking))
    _write_json(folder / "tokenizer.json", train_tokenizer(texts))
    _write_json(folder / "tokenizer_config.json", tokenizer_config())


def write_config(folder: Path, shape: Shape) -> None:
    end_of_text, end_of_turn = added_id(END_OF_TEXT), added_id(END_OF_TURN)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        "max_position_embeddings": shape.context_length,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_turn,
        "torch_dtype": "bfloat16",
    }
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_turn, end_of_text],
        "pad_token_id": end_of_text,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation)


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write model.safetensors in bf16."""
    tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in weights.items()}
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library leaves it to its owner alone


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read model.safetensors as fp32."""
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def write_model_card(folder: Path, shape: Shape, table: str, how: str) -> None:
    """Write README.md: what the model is, what it is not, and how it did."""
    parameters = sum(torch.Size(size).numel() for size in shape.sizes().values())
    picture = "\n\n![loss](loss.png)" if (folder / "loss.png").exists() else ""
    text = f"""\
---
license: apache-2.0
language: [en, zh]
tags: [qwen3, demo]
---
# lightqwen demo

A Qwen3 in small, for demonstrations and tests of a server: {parameters / 1e6:.1f} million parameters.

- {shape.layers} layers of width {shape.hidden_size}, {shape.heads} query heads on {shape.kv_heads} KV heads of \
{shape.head_dim}, q/k norm, tied embeddings, a context of {shape.context_length} tokens
- a byte-level BPE of {shape.vocab_size} entries with Qwen3's special tokens
- a chat template in Qwen3's format: `enable_thinking`, tools, tool calls and their results

**What it is.** It was trained from scratch by `python -m model.demo.train`, on nothing but text that the generators in
`model/demo/skills/` make from a seed: English and Chinese conversations over skills whose answers a program can check.
It calculates with up to three digits, with and without a `<think>` trace, counts, sorts, edits words, converts units
and dates, answers questions about a text (also far back in the context), writes JSON that follows a schema, calls tools
and uses what they return, tells short stories from a template, and says that it does not know.

**What it is not.** It is no assistant: it knows nothing about the world, and understands no wording that is far from
the generators'. Outside of what it was taught it makes things up. Do not rely on its answers. It is derived from no
other model, and no data was downloaded.

## How it does

Held-out questions, answered greedily; the share of right answers with a thought before the answer, without one, and
together. A hash of what is asked, whatever the wording, decides whether a question is held out; training skips those.
`python -m model.demo.evaluate` asks them through a running server.

{table}

## Training

{how}{picture}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
