"""Benchmarks against other tools and against bare loops, measured side by side in one run and compared as ratios."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
"""The checkout, with `jobs/`."""
