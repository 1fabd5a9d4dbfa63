"""From storage to pixels: knows nothing of models."""
