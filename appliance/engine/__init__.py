"""Continuous batching over one llama.cpp context. Knows tokens; not keys, plans, HTTP or SQLite."""
