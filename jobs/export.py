"""Export a bundle to SavedModel, ONNX and LiteRT, and keep each format that gives the same answers."""

from cnnray import commandline
from cnnray.models.export import ExportConfig, export


def main() -> None:
    config = commandline.parse(ExportConfig, "jobs/export.py")

    def job() -> dict[str, object]:
        return export(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
