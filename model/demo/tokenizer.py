"""The demo model's tokenizer: byte-level BPE, trained on what the skills say, with Qwen3's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from model.demo.chat import ADDED_TOKENS, CHAT_TEMPLATE, CONTROL_TOKENS, END_OF_TEXT, END_OF_TURN

VOCAB_SIZE = 4096
CONTEXT_LENGTH = 4096
FIRST_ADDED_ID = VOCAB_SIZE - len(ADDED_TOKENS)

# Where Qwen3's tokenizer cuts a text before BPE: contractions, words with the blank before them, single digits, signs.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added_id(token: str) -> int:
    return FIRST_ADDED_ID + ADDED_TOKENS.index(token)


def train_tokenizer(texts: Iterable[str]) -> dict[str, Any]:
    """Train BPE; returns the content of tokenizer.json.

    Only vocabulary and merges are taken from the trainer. The rest is spelled out here, so that the file does not
    depend on how some version of the library writes it.

    Raises:
        ValueError: the texts are too few for the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            # While merges are learnt: each Chinese character stays alone, or whole phrases would become one token.
            pre_tokenizers.Split(Regex(r"[\p{Han}，。？！：、；“”]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=FIRST_ADDED_ID, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    if len(trained["vocab"]) != FIRST_ADDED_ID:
        raise ValueError(f"the texts give {len(trained['vocab'])} tokens, {FIRST_ADDED_ID} are wanted")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token) for token in ADDED_TOKENS],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted(trained["vocab"].items(), key=lambda item: item[1])),
            "merges": trained["merges"],
        },
    }


def _added_token(token: str) -> dict[str, Any]:
    return {
        "id": added_id(token),
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token in CONTROL_TOKENS,
    }


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
