"""Measure a bundle on labelled images: python jobs/evaluate.py --bundle DIR --data DIR --output DIR"""

from typing import Any

from cnnray import commandline
from cnnray.evaluation.config import EvaluateConfig


def run(config: EvaluateConfig) -> dict[str, Any]:
    from cnnray.evaluation.job import check_data, evaluate

    return check_data(config) if config.check_data else evaluate(config)


if __name__ == "__main__":
    commandline.main(EvaluateConfig, "jobs/evaluate.py", run)
