"""A bundle as a model of MLflow: its files, and `mlflow.pyfunc.load_model` that gives them to `Predictor`.

Nothing of a model's folder is run: MLflow imports this module by its name, and it loads the bundle as every job does.
The folder must hold no `code` for that, which MLflow would import; `log` writes none.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor

if TYPE_CHECKING:
    import pandas as pd

IMAGE = "image"
"""The column of encoded images."""
BUNDLE_TAG = "cnnray.bundle"
"""A model version's tag: `Bundle.version`."""


class BundleModel:
    """What `mlflow.pyfunc.load_model` gives."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Classify encoded images.

        Args:
            model_input: a table with the column `image` of bytes, or a list of bytes.
            params: MLflow's; there are none.

        Returns:
            a row for each image, in order: `prediction`, `confidence`, `probabilities` (in the order of the bundle's
            class names), or null in all of them and an `error`.
        """
        import pandas as pd

        images = model_input if isinstance(model_input, list) else list(model_input[IMAGE])
        rows: list[dict[str, Any]] = []
        for answer in self._predictor([bytes(image) for image in images]):
            if isinstance(answer, BadImage):
                rows.append({"prediction": None, "confidence": np.nan, "probabilities": None, "error": str(answer)})
            else:
                rows.append(
                    {
                        "prediction": answer.label,
                        "confidence": answer.confidence,
                        "probabilities": answer.probabilities.tolist(),
                        "error": None,
                    }
                )
        return pd.DataFrame(rows, columns=["prediction", "confidence", "probabilities", "error"])


def _load_pyfunc(path: str) -> BundleModel:
    """Called by MLflow, by this name."""
    return BundleModel(Predictor(Bundle.load(path)))


def log(bundle: Bundle, *, run_id: str, name: str) -> tuple[str, str]:
    """Give a bundle to the MLflow server that `mlflow.set_tracking_uri` has named, as a new version of a model.

    Args:
        bundle: local or on S3.
        run_id: the run that it comes from.
        name: of the registered model, which need not be there.

    Returns:
        the version, and the id of the model that was logged.

    Raises:
        MlflowException, OSError: it could not be done.
    """
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, IMAGE)]),
        outputs=Schema(
            [
                ColSpec(DataType.string, "prediction", required=False),
                ColSpec(DataType.double, "confidence", required=False),
                ColSpec(Array(DataType.double), "probabilities", required=False),
                ColSpec(DataType.string, "error", required=False),
            ]
        ),
    )
    with tempfile.TemporaryDirectory(prefix="cnnray-mlflow-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it would like an example of the input beside the signature
        files = Path(folder, "bundle")
        storage.copy_folder(bundle.uri, str(files))
        logged = Model.log(
            None,
            mlflow.pyfunc,
            name="bundle",
            run_id=run_id,
            registered_model_name=name,
            tags={BUNDLE_TAG: bundle.version},
            loader_module=__name__,
            data_path=str(files),
            # Given, so that MLflow does not load the model in a process of its own to find them out.
            pip_requirements=[f"{library}=={found}" for library, found in bundle.info.library_versions.items()],
            signature=signature,
        )
    return str(logged.registered_model_version), logged.model_id
