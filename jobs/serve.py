"""Classify images over HTTP: python jobs/serve.py --bundle DIR"""

from cnnray import commandline
from cnnray.serving.config import ServeConfig


def main() -> None:
    config = commandline.parse(ServeConfig, "jobs/serve.py")

    def job() -> dict[str, object]:
        from cnnray.serving.deploy import serve, write_configuration

        return write_configuration(config) if config.write_config else serve(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
