"""Small data sets written for this project; see README.md."""
