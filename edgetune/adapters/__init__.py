"""LoRA put on a model, switched off, and kept on disk."""
