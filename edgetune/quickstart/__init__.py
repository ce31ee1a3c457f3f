"""The quickstart: the whole road on embedded data and the two built-in bases."""
