"""Measurements become HTML pages; no torch."""
