"""Train a classifier on a folder of images: python jobs/train.py --data DIR --output DIR"""

from typing import Any

from cnnray import commandline
from cnnray.training.config import TrainConfig


def run(config: TrainConfig) -> dict[str, Any]:
    if config.preview_augmentations is not None:
        from cnnray.training.preview import preview

        return preview(config)
    if config.sanity or config.find_learning_rate:
        from cnnray.training import probes

        return probes.check_sanity(config) if config.sanity else probes.find_learning_rate(config)
    from cnnray.training.job import train

    return train(config)


if __name__ == "__main__":
    commandline.main(TrainConfig, "jobs/train.py", run)
