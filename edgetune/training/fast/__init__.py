"""The same training step, exact but quicker."""
