"""Answers of a checkpoint in Hugging Face format to a prompt, or to a file of questions."""
