"""What happens, told to others: MLflow servers and Prometheus."""
