"""Decoders in C++: all layers in one call, adapters added where a result is written."""
