"""Plumbing: config, data, checkpoints, the training loop, images, logging."""
