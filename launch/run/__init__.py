"""One training run: build, folder, stages, trainer options, plan."""
