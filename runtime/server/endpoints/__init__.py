"""The HTTP paths and what each answers."""
