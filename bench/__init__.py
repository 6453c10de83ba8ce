"""Benchmarks: each is one command that prints a table and can write JSON. They report; they never gate.

`load` is the one that users have too, as `lightqwen bench`.
"""
