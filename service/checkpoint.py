"""What the gateway needs to know of a checkpoint: sizes, end-of-sequence ids, sampling defaults, tokenizer files.

Only JSON is read, each file up to a size; nothing in a folder can make this process run code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.requests import Sampling
from worker.config import ConfigError

MAX_JSON_BYTES = 4 * 2**20
MAX_TOKENIZER_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The model as clients see it."""

    name: str
    revision: str = ""
    vocab_size: int
    context_length: int
    eos_ids: tuple[int, ...]
    defaults: Sampling  # from generation_config.json
    default_max_tokens: int | None = None
    tokenizer_sha256: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    tokenizer_json: str
    chat_template: str | None
    special_tokens: dict[str, str]  # template variables such as eos_token


def read_card(folder: Path, *, name: str, revision: str = "") -> ModelCard:
    """Read config.json and generation_config.json.

    Raises:
        ConfigError: a file is missing, too large, not JSON or says something impossible.
    """
    config_path, generation_path = folder / "config.json", folder / "generation_config.json"
    config = _read_json(config_path)
    if config is None:
        raise ConfigError(f"{folder} has no config.json; --model wants the folder of a Qwen3 checkpoint")
    generation = _read_json(generation_path) or {}
    tokenizer = folder / "tokenizer.json"
    digest = hashlib.sha256(_read(tokenizer, MAX_TOKENIZER_BYTES)).hexdigest() if tokenizer.exists() else ""
    return ModelCard(
        name=name,
        revision=revision,
        vocab_size=_positive(config, "vocab_size", config_path),
        context_length=_positive(config, "max_position_embeddings", config_path),
        eos_ids=_eos_ids(generation.get("eos_token_id", config.get("eos_token_id")), folder),
        defaults=_defaults(generation, generation_path),
        default_max_tokens=_positive(generation, "max_new_tokens", generation_path)
        if generation.get("max_new_tokens") is not None
        else None,
        tokenizer_sha256=digest,
    )


def read_tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """Read tokenizer.json and the chat template; None when the folder has no tokenizer.json.

    Raises:
        ConfigError: as `read_card`.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    settings = _read_json(folder / "tokenizer_config.json") or {}
    template_file = folder / "chat_template.jinja"
    if template_file.exists():
        template: str | None = _decode(_read(template_file, MAX_JSON_BYTES), template_file)
    else:
        template = _template(settings.get("chat_template"))
    return TokenizerFiles(
        tokenizer_json=_decode(_read(path, MAX_TOKENIZER_BYTES), path),
        chat_template=template,
        special_tokens=_special_tokens(settings),
    )


def _template(value: object) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones of which `default` is meant."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """`eos_token` and the like: a string, or an object with `content`."""
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        value = settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _defaults(generation: dict[str, Any], path: Path) -> Sampling:
    values: dict[str, Any] = {}
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {name} must be a number, got {value!r}")
        values[name] = float(value)
    values["top_k"] = _integer(generation, "top_k", path)
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    return Sampling(**values)


def _eos_ids(value: object, folder: Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(f"{folder}: eos_token_id must be token ids, got {value!r}")
    return tuple(dict.fromkeys(ids))


def _positive(values: dict[str, Any], name: str, path: Path) -> int:
    value = _integer(values, name, path)
    if value is None or value <= 0:
        raise ConfigError(f"{path}: {name} must be a positive integer, got {value!r}")
    return value


def _integer(values: dict[str, Any], name: str, path: Path) -> int | None:
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ConfigError(f"{path}: {name} must be an integer, got {value!r}")
    return value


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(_read(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return value


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > limit:
        raise ConfigError(f"{path} is larger than {limit} bytes")
    return data


def _decode(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8") from error
