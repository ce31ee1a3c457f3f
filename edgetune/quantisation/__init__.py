"""Weights become codes and back: tensors in, tensors out, no model."""
