"""A report on how well a bundle does, over labelled images."""
