"""Serves bundles over HTTP: an ASGI application, and its deployment on Ray Serve."""
