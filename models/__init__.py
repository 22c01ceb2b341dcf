"""Networks alone: (z, logsnr, label) -> output."""
