"""Measure a bundle on labelled images: python jobs/evaluate.py --bundle DIR --data DIR --output DIR"""

from typing import Any

from cnnray import commandline
from cnnray.evaluation.config import EvaluateConfig


def run(config: EvaluateConfig) -> dict[str, Any]:
    if config.check_data:
        from cnnray.evaluation.data_checks import check_data

        return check_data(config)
    if config.drift is not None:
        from cnnray.evaluation.drift import measure_drift

        return measure_drift(config)
    from cnnray.evaluation.job import evaluate

    return evaluate(config)


if __name__ == "__main__":
    commandline.main(EvaluateConfig, "jobs/evaluate.py", run)
