"""Classify millions of images with a bundle: python jobs/predict.py --bundle DIR --input DIR --output DIR"""

from typing import Any

from cnnray import commandline
from cnnray.prediction.config import PredictConfig


def run(config: PredictConfig) -> dict[str, Any]:
    from cnnray.prediction import job

    return job.dry_run(config) if config.dry_run else job.run(config)


if __name__ == "__main__":
    commandline.main(PredictConfig, "jobs/predict.py", run)
