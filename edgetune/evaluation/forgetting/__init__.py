"""General ability before and after training, on the same items."""
