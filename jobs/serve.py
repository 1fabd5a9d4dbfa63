"""Classify images over HTTP: python jobs/serve.py --bundle DIR"""

from typing import Any

from cnnray import commandline
from cnnray.serving.config import ServeConfig


def run(config: ServeConfig) -> dict[str, Any]:
    from cnnray.serving.deploy import serve, write_configuration

    return write_configuration(config) if config.write_config else serve(config)


if __name__ == "__main__":
    commandline.main(ServeConfig, "jobs/serve.py", run)
