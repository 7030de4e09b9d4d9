"""Pictures of samples: image grids, plots of points, paths."""
