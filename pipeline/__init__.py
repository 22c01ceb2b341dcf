"""From a config to images: config, data, networks, checkpoints, sampling."""
