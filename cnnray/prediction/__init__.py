"""Offline prediction for millions of images, with one output row for each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

    from cnnray.prediction.config import PredictOptions


def predict(
    bundle: str, images: "str | Sequence[str] | pa.Table", options: "PredictOptions | None" = None
) -> "ray.data.Dataset":
    """Classify images on the Ray cluster that this process is connected to (`ray.init`).

    Args:
        bundle: folder or s3:// prefix of the bundle.
        images: what `jobs/predict.py --input` takes, or a list of paths and s3:// addresses, or a manifest (see
            `images.manifest`).
        options: engine, columns and workers; None: the defaults.

    Returns:
        a lazy dataset with one row for each image (columns: see `prediction.worker`), in any order.

    Raises:
        ValueError, OSError, ClusterError: with a sentence for the user.
    """
    from cnnray.images import manifest as manifests
    from cnnray.models.bundle import Bundle
    from cnnray.prediction import pipeline
    from cnnray.prediction.config import PredictOptions
    from cnnray.prediction.plan import plan_when_resources_allow
    from cnnray.prediction.worker import select_columns

    if isinstance(images, str):
        manifest = manifests.build_manifest(images, labelled=False)
    else:
        manifest = manifests.manifest_from_uris(images) if isinstance(images, Sequence) else images
    plan = plan_when_resources_allow(Bundle.load(bundle), options or PredictOptions())
    return pipeline.predict(select_columns(manifest), plan)
