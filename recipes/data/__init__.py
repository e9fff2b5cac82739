"""Chat data for training: rows of files, through the processor, to batches."""
