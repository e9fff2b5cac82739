"""Training runs: their settings, and Megatron-Bridge's own training loop with our checkpoints and log."""
