"""The bundled demo checkpoint, a folder like any other, and what made it: text, training, evaluation."""
