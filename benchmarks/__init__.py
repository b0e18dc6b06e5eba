"""What the program claims about speed and memory, runnable: `python -m benchmarks.<name>`."""
