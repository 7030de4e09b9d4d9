"""Speed, measured by hand: `python -m benchmarks.run`."""
