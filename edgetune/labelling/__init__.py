"""Few rows with labels and many texts without become rows for a new adapter."""
