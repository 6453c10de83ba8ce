"""The bundled demo checkpoint, a folder like any other, and the script that makes it."""
