"""What any room may import and what imports no room: errors, files, settings, names."""
