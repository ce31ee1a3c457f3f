"""A bundle folder is read, checked and compared."""
