"""From a manifest to a bundle: Keras 3 under MultiWorkerMirroredStrategy, driven by Ray Train."""
