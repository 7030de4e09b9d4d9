"""Images for people: image grids of samples, plots of points and paths, and what all plots share."""
