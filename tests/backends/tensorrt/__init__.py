"""TensorRT's half of the backends' tests."""
