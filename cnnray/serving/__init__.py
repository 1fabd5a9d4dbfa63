"""Bundles over HTTP: one ASGI application, and its deployment on Ray Serve."""
