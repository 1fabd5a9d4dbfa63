"""Train on scikit-learn's handwritten digits with two workers, then classify a few: make demo"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cnnray import commandline, flags
from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models import startup
from cnnray.training.config import TrainConfig

FEW = 6


def write_digits(folder: Path) -> None:
    """Write the 1,797 real digits, 8x8 pixels in 17 greys, as PNG class folders."""
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype(np.uint8)).save(path)


def show_answers(bundle: str, manifest: str) -> None:
    """Classify a few of the held-out digits as any program would."""
    import pyarrow.parquet as pq

    from cnnray.models.bundle import Bundle
    from cnnray.models.predictor import Predictor

    rows = [row for row in pq.read_table(manifest).to_pylist() if row["split"] == "validation"]
    startup.load_tensorflow(gpus=False)
    rows = rows[:: len(rows) // FEW][:FEW]
    predictor = Predictor(Bundle.load(bundle))
    for row, answer in zip(rows, predictor([Path(r["uri"]).read_bytes() for r in rows]), strict=True):
        if isinstance(answer, BadImage):
            raise answer
        print(f"  {row['uri']}: {answer.label} ({answer.confidence:.3f}), labelled {row['label']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="jobs/demo.py", description=__doc__)
    parser.add_argument("--folder", default="demo", help="where digits and run go")
    folder = parser.parse_args().folder
    if not storage.is_local(folder):
        parser.error(f"--folder {folder} is not local: give a local folder.")
    try:
        folder = Path(flags.absolute("folder", folder))
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def job() -> dict[str, object]:
        from cnnray.training.job import train

        write_digits(folder / "digits")
        config = TrainConfig(
            data=str(folder / "digits"),
            output=str(folder / "run"),
            preset="quick",
            epochs=8,  # enough for digits
            max_workers=2,
            overwrite=True,
        )
        summary = train(config)
        metrics = summary["metrics"]
        print(f"\nheld-out accuracy: {metrics['val_accuracy']:.4f}")
        print(f"bundle: {summary['bundle']}")
        show_answers(summary["bundle"], f"{config.output}/manifest.parquet")
        return summary

    commandline.run(job, str(folder / "run"))


if __name__ == "__main__":
    main()
