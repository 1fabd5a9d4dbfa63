"""Distributed image classification on Ray: from images to a trained bundle, its answers and a service."""

__version__ = "0.2.0"
