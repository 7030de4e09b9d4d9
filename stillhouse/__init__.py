"""The library: diffusion, networks, checkpoints, metrics and analysis in PyTorch alone, without Lightning and Hydra."""
