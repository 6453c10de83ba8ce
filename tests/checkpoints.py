"""A checkpoint of random weights for tests that need some model, and not what it says."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from model.demo import bundle
from model.demo.network import Shape, initial_weights

DEMO = Path(bundle.__file__).parent
"""The bundled checkpoint."""


@cache
def endless() -> Path:
    """The bundled tokenizer and 2 layers of random weights: quick, and no token ends what it says. Read only.

    Weights are scaled so that logits are spread (greedy choices do not hang on rounding) and a token is not simply
    followed by itself.
    """
    home = Path(tempfile.mkdtemp(prefix="lightqwen-tests-"))
    atexit.register(shutil.rmtree, home)
    folder = home / "endless"
    folder.mkdir()
    for name in bundle.TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder)
    shape = Shape(hidden_size=128, intermediate_size=256, layers=2, heads=4)
    weights = initial_weights(shape, seed=1)
    bundle.write_weights(folder, {name: 4 * x if x.dim() == 2 else x for name, x in weights.items()})
    bundle.write_config(folder, shape)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        del content["eos_token_id"]
        (folder / name).write_text(json.dumps(content))
    return folder
