"""The shapes of the published dense Qwen3 checkpoints, of which benchmarks run on random weights, and for which kernels
are compiled in advance: nothing is downloaded.

Numbers from the config.json of each Qwen/Qwen3-* model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

# size: (hidden, intermediate, layers, heads, kv_heads, tied)
_SHAPES = {
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "1.7B": (2048, 6144, 28, 16, 8, True),
    "4B": (2560, 9728, 36, 32, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
    "14B": (5120, 17408, 40, 40, 8, False),
    "32B": (5120, 25600, 64, 64, 8, False),
}
SIZES = tuple(_SHAPES)


def split_share(text: str) -> tuple[str, int]:
    """Return "32B/2", one rank's share of a size, as ("32B", 2), and "32B" as ("32B", 1).

    Raises argparse.ArgumentTypeError for other sizes, or numbers of ranks that do not divide the KV heads.
    """
    size, slash, ranks = text.partition("/")
    if size not in SIZES or (slash and ranks not in ("1", "2", "4", "8")):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(SIZES)}, nor such a one with /2, /4 or /8")
    return size, int(ranks or 1)


def share(text: str) -> str:
    """For argparse: `text`, if `split_share` takes it."""
    split_share(text)
    return text


def write_config(size: str, folder: Path) -> Path:
    """Write the config.json of one size into `folder` (made if missing) and return the folder."""
    hidden, intermediate, layers, heads, kv_heads, tied = _SHAPES[size]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "eos_token_id": 151645,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
