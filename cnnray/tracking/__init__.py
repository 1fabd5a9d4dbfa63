"""What happens, reported to MLflow servers and Prometheus."""
