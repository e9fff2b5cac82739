"""Comparing two checkpoints: their numbers, and what the models compute."""
