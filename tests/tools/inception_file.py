"""Random Inception weights, for tests that import this file by its name."""

from benchmarks.random_inception import write_inception

__all__ = ["write_inception"]
