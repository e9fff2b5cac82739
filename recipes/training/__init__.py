"""Megatron-Bridge's own training loop with our checkpoints and log; importing it makes Megatron-Bridge importable."""
