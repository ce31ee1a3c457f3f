"""Decoders in C++ as fast as memory: all layers in one call, adapters without a cost."""
