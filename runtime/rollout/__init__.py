"""New versions of an adapter: fetched, checked, tried behind an alias, kept or rolled back."""
