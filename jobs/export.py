"""Add other formats to a bundle: SavedModel, ONNX and LiteRT, each proven before it is kept."""

from cnnray import commandline
from cnnray.models.export import ExportConfig


def main() -> None:
    config = commandline.parse(ExportConfig, "jobs/export.py")

    def job() -> dict[str, object]:
        from cnnray.models import startup

        startup.load_tensorflow(gpus=False)
        from cnnray.models.export import export

        return export(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
