"""Export to other runtimes, one module per runtime."""
