"""Answers are sampled and rewarded."""
