"""What a data file holds, and the recipe that fits it; nothing is trained."""
