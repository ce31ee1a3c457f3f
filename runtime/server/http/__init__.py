"""Requests are read and checked, answers written, counted and logged."""
