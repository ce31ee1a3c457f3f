"""Graphs run: sessions, caches and batches."""
