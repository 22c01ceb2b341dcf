"""Plumbing that knows nothing of diffusion: command line, files, images, processes, YAML."""
