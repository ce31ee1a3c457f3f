"""One TOML a device."""

