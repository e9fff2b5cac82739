"""Answers of a checkpoint in Hugging Face format: to one prompt, or to a file of questions."""
