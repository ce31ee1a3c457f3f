"""A batch becomes a loss; no files."""
