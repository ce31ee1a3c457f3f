"""What a run is told: the recipe, read, checked and written back; no numpy, no torch."""
