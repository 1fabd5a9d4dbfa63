"""The flags of experiment tracking."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from cnnray import configs


@configs.group(resumable=True, searchable=False, tracked=False)
@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The MLflow server that follows the run."""

    mlflow: str | None = None
    """MLflow server that gets the flags, the metrics of each epoch and the bundle, such as http://HOST:5000; null:
    none."""
    mlflow_experiment: str = "cnnray"
    """Experiment of that server that the run belongs to; it is made where it is missing."""
    mlflow_model: str | None = None
    """Name that the bundle is registered under; null: that of the experiment."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        if self.mlflow == "" or not self.mlflow_experiment or self.mlflow_model == "":
            raise ValueError("--mlflow, --mlflow-experiment and --mlflow-model must not be empty.")
        if self.mlflow and "@" in urlsplit(self.mlflow).netloc:
            raise ValueError(
                "--mlflow must hold no password, as flags are written into the output: set MLFLOW_TRACKING_USERNAME "
                "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
            )
