"""The quickstart on a CPU: digits, a tiny model, training, conversion, evaluation, figures."""
