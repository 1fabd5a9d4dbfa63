"""Inputs of prediction runs that change, and what training and prediction runs leave."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cnnray.images import storage
from tests.awkward import awkward_images

GOOD = awkward_images()["rgb.png"]


def fill(root: str, count: int = 45) -> None:
    """Write images to three folders, on a disk or to a bucket."""
    images = list(awkward_images().values())
    write_all(root, {f"{number % 3}/{number:05d}.png": images[number % len(images)] for number in range(count)})


def write_all(root: str, files: dict[str, bytes]) -> None:
    """Write files below a folder, or to a bucket."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write_bytes(storage.join(root, name), files[name]), files))


def change(root: str) -> set[str]:
    """Change two of the images, delete eleven, and add two.

    Returns:
        those that are to be read again.
    """
    again = {storage.join(root, name) for name in ("0/00003.png", "2/00044.png", "0/000000.png", "3/new.png")}
    for uri in again:
        storage.write_bytes(uri, GOOD)
    for number in range(1, 33, 3):
        storage.delete_file(storage.join(root, "1", f"{number:05d}.png"))
    return again


def without_ids(rows):
    """The other columns of rows, by uri."""
    return {row["uri"]: {name: value for name, value in row.items() if name != "id"} for row in rows}


def last_checkpoint(output: Path) -> Path:
    """The folder of a run's latest checkpoint."""
    snapshot = json.loads((output / "checkpoints" / "checkpoint_manager_snapshot.json").read_text())
    return output / "checkpoints" / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]


def final_state(output: Path):
    """The arrays that a run ended with: the bundle's weights, and the rest of the state (see `Steps.state`)."""
    import keras
    import numpy as np

    checkpoint = last_checkpoint(output)
    weights = keras.saving.load_model(checkpoint / "bundle" / "model.keras", compile=False).get_weights()
    with np.load(checkpoint / "state.npz") as state:
        return weights, [state[name] for name in sorted(state.files)]


def largest_difference(actual, expected) -> float:
    """The largest difference between two lists of arrays, divided by the largest absolute expected value."""
    import numpy as np

    scale = max(np.abs(values).max() for values in expected)
    return max(np.abs(a - b).max() for a, b in zip(actual, expected, strict=True)) / scale


def read_rows(output: Path, kind: str = "parquet"):
    """The rows of a prediction run's parts as dicts, in the order of the files."""
    import pyarrow as pa
    import pyarrow.parquet

    paths = sorted(output.glob(f"part-*.{kind}"))
    if kind == "parquet":
        return pa.concat_tables(map(pyarrow.parquet.read_table, paths)).to_pylist()
    if kind == "jsonl":
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    rows = []
    for path in paths:
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    return [{name: _value(name, text) for name, text in row.items()} for row in rows]


def _value(name, text):
    if text == "":
        return None
    if name in ("id", "shot", "confidence") or text.startswith("["):
        return json.loads(text)
    return text
