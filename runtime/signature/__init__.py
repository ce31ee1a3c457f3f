"""A publisher's signature over the files of a folder: written at a desk, checked on the device."""
