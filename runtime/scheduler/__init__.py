"""Many callers share one engine."""
