"""What an update and a sample cost."""
