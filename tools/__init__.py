"""Commands that run once: publishing, and converting other formats."""
