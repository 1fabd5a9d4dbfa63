"""Measurements against peers and bare limits: ratios of figures taken side by side in one run."""
