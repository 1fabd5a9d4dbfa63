"""What tests look at after a training run."""

import json
from pathlib import Path


def last_checkpoint(output: Path) -> Path:
    """The folder of a run's latest checkpoint."""
    snapshot = json.loads((output / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    return output / "checkpoints" / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]


def final_state(output: Path):
    """The weights and the optimizer's variables that a run ended with: arrays."""
    import keras
    import numpy as np

    checkpoint = last_checkpoint(output)
    weights = keras.saving.load_model(checkpoint / "bundle" / "model.keras", compile=False).get_weights()
    with np.load(checkpoint / "optimizer.npz") as optimizer:
        return weights, [optimizer[str(index)] for index in range(len(optimizer.files))]


def largest_difference(found, expected) -> float:
    """The largest difference between two lists of arrays, in terms of the largest value."""
    import numpy as np

    scale = max(np.abs(values).max() for values in expected)
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) / scale
