"""Numbers from answers: pure functions of predictions and references."""
