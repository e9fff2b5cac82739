"""Where rows are stored: JSON, tables, archives and tokens, each as a sequence of rows that are read on access."""
