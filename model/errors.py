"""What goes wrong with a checkpoint or a device, told so that its owner can mend it."""

from __future__ import annotations


class ModelError(Exception):
    """A checkpoint or a device cannot be used. The message is one line that names the thing and the remedy."""
