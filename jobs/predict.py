"""Classify millions of images with a bundle: python jobs/predict.py --bundle DIR --input DIR --output DIR"""

from cnnray import commandline
from cnnray.prediction.config import PredictConfig


def main() -> None:
    config = commandline.parse(PredictConfig, "jobs/predict.py")

    def job() -> dict[str, object]:
        from cnnray.prediction.job import dry_run, run

        return dry_run(config) if config.dry_run else run(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
