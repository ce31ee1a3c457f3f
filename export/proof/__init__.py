"""The bundle equals the model that was trained, in numbers."""
