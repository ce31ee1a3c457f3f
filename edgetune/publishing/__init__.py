"""A bundle or an adapter goes to a registry, the hub or a folder; no torch."""
