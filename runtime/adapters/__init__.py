"""Adapter folders become the tensors a graph takes."""
