"""A model becomes ONNX graphs."""
