"""Searches over training flags with Ray Tune."""
