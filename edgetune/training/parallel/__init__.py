"""Several processes that share every training step."""
