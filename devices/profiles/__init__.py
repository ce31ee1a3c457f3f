"""One TOML a device."""
