"""The method, on tensors alone: it knows no network class, no file and no config."""
