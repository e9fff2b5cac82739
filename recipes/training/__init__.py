"""Megatron-Bridge's own training loop with our checkpoints and log."""

from ...bridge import plugin  # noqa: F401 - first: it makes Megatron-Bridge importable, and the model known to it
