"""Moving bytes: reading, writing, resuming, reporting. Knows neither the model nor a file format."""
