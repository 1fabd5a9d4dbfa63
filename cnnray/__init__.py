"""Distributed image classification on Ray: Keras 3 training, batch prediction and serving."""
