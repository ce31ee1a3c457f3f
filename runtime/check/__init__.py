"""Latency and memory measured against a budget."""
