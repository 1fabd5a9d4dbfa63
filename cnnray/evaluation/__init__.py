"""Measures how well a bundle classifies labelled images, and writes a report."""
