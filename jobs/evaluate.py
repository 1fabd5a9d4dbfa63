"""Measure a bundle on labelled images: python jobs/evaluate.py --bundle DIR --data DIR --output DIR"""

from cnnray import commandline
from cnnray.evaluation.config import EvaluateConfig


def main() -> None:
    config = commandline.parse(EvaluateConfig, "jobs/evaluate.py")

    def job() -> dict[str, object]:
        from cnnray.evaluation.job import check_data, evaluate

        return check_data(config) if config.check_data else evaluate(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
