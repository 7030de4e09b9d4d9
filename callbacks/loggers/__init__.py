"""Where logged values go: CSV, TensorBoard, Weights & Biases."""
