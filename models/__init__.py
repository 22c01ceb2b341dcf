"""Networks: (z, logsnr, **condition) -> output."""
