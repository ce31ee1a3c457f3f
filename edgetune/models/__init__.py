"""A base model on disk and the torch module made of it."""
