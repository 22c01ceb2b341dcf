"""Commands that run once: publishing, and formats of others."""
