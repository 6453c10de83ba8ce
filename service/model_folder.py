"""From what --model says to a folder on disk, and what can be told of that folder before anything heavy starts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from worker.config import ConfigError

ARCHITECTURE = "Qwen3ForCausalLM"
DEMO_NAME = "lightqwen-demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt"]


def find_checkpoint(model: str, revision: str | None, say: Callable[[str], None]) -> tuple[Path, str | None]:
    """Return the checkpoint's folder, and its name where the folder's own would not do. Downloads a hub id.

    Raises:
        ConfigError: there is no such checkpoint, or it is not a Qwen3.
    """
    folder = Path(model).expanduser()
    if model and not folder.exists() and HUB_ID.fullmatch(model):
        downloaded = _download(model, revision, say)
        check_checkpoint(downloaded)
        return downloaded, model
    if revision is not None:
        raise ConfigError(f"--revision goes with a hub id, and --model is {model or 'the bundled demo'!r}")
    if not model:
        folder = _demo_folder()
    check_checkpoint(folder)
    return folder.resolve(), None if model else DEMO_NAME


def check_checkpoint(folder: Path) -> None:
    """Check what config.json tells.

    Raises:
        ConfigError: the folder is not there, has no readable config.json, or holds another architecture.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--model: no folder {folder}; name a checkpoint's folder or a hub id such as Qwen/Qwen3-0.6B"
        )
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--model: {folder} has no config.json: not a checkpoint in Hugging Face format") from None
    except OSError as error:
        raise ConfigError(f"--model: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--model: {path} is not JSON: {error}") from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    if architectures != [ARCHITECTURE]:
        found = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "unnamed"
        raise ConfigError(f"--model: {folder} is of the architecture {found}; lightqwen serves {ARCHITECTURE}")


def _demo_folder() -> Path:
    spec = importlib.util.find_spec("model")  # finds the package without running any of it
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("--model: the bundled demo checkpoint is not installed; name a folder or a hub id")
    return Path(spec.submodule_search_locations[0]) / "demo"


def _download(model: str, revision: str | None, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    say(f"getting {model} from the hub" + (f" at {revision}" if revision else ""))
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"--model: {model} is no folder, is not in the hub's cache, and the hub is out of reach"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--model: cannot get {model} from the hub: {reason}") from error
