"""Train a classifier on a folder of images: python jobs/train.py --data DIR --output DIR"""

from cnnray import commandline
from cnnray.training.config import TrainConfig


def main() -> None:
    config = commandline.parse(TrainConfig, "jobs/train.py")

    def job() -> dict[str, object]:
        if config.preview_augmentations is not None:
            from cnnray.training.preview import preview

            return preview(config)
        from cnnray.training.job import train

        return train(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
