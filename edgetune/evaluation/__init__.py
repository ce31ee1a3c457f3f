"""A file of questions becomes metrics."""
