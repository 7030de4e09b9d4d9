"""What a GPU does with every part of this project, within the minutes that one is at hand: `python -m benchmarks.gpu`."""
