"""The engine: schedules requests over slots and KV blocks, plans steps, and runs them on tensor-parallel ranks.

Imports `model`, never `service`. What `service` may import from here: `messages`, `config`, `client`, `control`,
`supervisor` and `vitals`. None of those imports torch at module level.
"""
