"""What a PyTorch user would write, against this library, on the same CPU: ``python -m benchmarks.peers``."""
