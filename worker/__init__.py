"""The engine: schedules requests over slots and KV blocks, plans steps, and runs them on tensor-parallel ranks.

Imports `model`, never `service`. What `service` may import from here: `messages`, `config`, `client` and `supervisor`.
None of those four imports torch at module level.
"""
