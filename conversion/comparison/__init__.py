"""Comparison of two checkpoints: their tensors, and the logits of the models."""
