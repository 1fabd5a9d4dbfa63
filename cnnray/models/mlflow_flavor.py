"""A bundle as an MLflow model, which `mlflow.pyfunc.load_model` loads into a `Predictor`.

No code in the model's folder runs: MLflow imports this module by its name, and the module loads the bundle as every
job does. MLflow would import a folder `code`; `log` writes none. MLflow servers store the name of this module and
call `_load_pyfunc`, so neither may be renamed.
"""

import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.models import engines
from cnnray.models.answers import FLOAT32
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor

if TYPE_CHECKING:
    import pandas as pd

IMAGE = "image"
"""Name of the column of encoded images."""
BUNDLE_TAG = "cnnray.bundle"
"""Tag of a model version; its value is `Bundle.version`."""


class BundleModel:
    """The model that `mlflow.pyfunc.load_model` returns."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> "pd.DataFrame":
        """Classify encoded images.

        Args:
            model_input: a table with a column `image` of bytes, or a list of bytes.
            params: required by MLflow and ignored.

        Returns:
            One row per image, in order, with the columns `prediction`, `confidence`, `probabilities` (in the order of
            the bundle's class names) and `error`. If an image cannot be decoded, only `error` is not null. If the
            bundle is unsure, `prediction` is null; a bundle that may be has the column `candidates`, too, a list
            of classes where it is, and with groups of classes the column `group`. A bundle with several labels has
            the column `labels`, and `prediction` is the most probable of them, or null.
        """
        import pandas as pd

        names = ["prediction", "confidence", "probabilities", "error"]
        names += _of_some(self._predictor.bundle)
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
                        "candidates": [*answer.candidates] or None,
                        "labels": [*answer.labels],
                        "group": answer.group,
                    }
                )
        return pd.DataFrame(rows, columns=names)


def _of_some(bundle: Bundle) -> dict[str, bool]:
    """The columns that the predictions of some bundles have, and whether each is a list."""
    if bundle.info.is_multi_label:
        return {"labels": True}
    if bundle.info.decision is None:
        return {}
    return {"candidates": True} | ({"group": False} if bundle.info.groups else {})


def _load_pyfunc(path: str) -> BundleModel:
    """Load the bundle at `path`. MLflow calls this function by its name."""
    bundle = Bundle.load(path)
    decision = bundle.info.decision
    engine = engines.KERAS
    if decision and FLOAT32 not in decision.thresholds:
        engine = engines.choose(bundle, gpus=False, batch_size=engines.BATCH_SIZE)
    return BundleModel(Predictor(bundle, engine=engine))


def log(bundle: Bundle, *, run_id: str, name: str) -> tuple[str, str]:
    """Register a bundle as a new version of a model on the MLflow server that `mlflow.set_tracking_uri` names.

    Args:
        bundle: local or on S3.
        run_id: the MLflow run that trained the bundle.
        name: name of the registered model, which is created if necessary.

    Returns:
        The version, and the id of the logged model.

    Raises:
        MlflowException, OSError: the server or the storage failed.
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
                *(
                    ColSpec(Array(DataType.string) if is_list else DataType.string, name, required=False)
                    for name, is_list in _of_some(bundle).items()
                ),
            ]
        ),
    )
    with tempfile.TemporaryDirectory(prefix="cnnray-mlflow-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow warns that there is no input example
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
            # Without a list, MLflow would load the model in another process to infer the requirements.
            pip_requirements=[f"{library}=={version}" for library, version in bundle.info.library_versions.items()],
            signature=signature,
        )
    return str(logged.registered_model_version), logged.model_id
