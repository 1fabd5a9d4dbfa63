"""Export a bundle to other formats: python jobs/export.py --bundle DIR --calibration DIR"""

from typing import Any

from cnnray import commandline
from cnnray.models.export import ExportConfig, export


def run(config: ExportConfig) -> dict[str, Any]:
    return export(config)


if __name__ == "__main__":
    commandline.main(ExportConfig, "jobs/export.py", run)
