"""Whether training keeps the decoded images in memory."""

import pyarrow as pa
import pytest

from cnnray.cluster import Node, Resources
from cnnray.images.manifest import ManifestError
from cnnray.training import data
from cnnray.training.config import TrainConfig
from cnnray.training.plan import share_out

FILES = [f"/d/{index}.png" for index in range(4)]
IN_PARQUET = [f"/d/x.parquet#000000-{index:09d}" for index in range(4)]


@pytest.mark.parametrize(
    ("uris", "cache", "store", "expected"),
    [
        (FILES, "auto", 10**6, True),
        (FILES, "auto", 4 * 10**5, False),  # more than a fifth of the object store
        (FILES, "auto", 10**4, False),
        (FILES, "none", 10**6, False),
        (FILES, "memory", 10**5, True),
        (FILES, "memory", 10**4, "--cache memory has to keep .*: use --cache none"),
        (IN_PARQUET, "auto", 10**5, True),
        (IN_PARQUET, "auto", 10**4, "images in Parquet, which training must keep in memory"),
        (IN_PARQUET, "none", 10**6, "images in Parquet, which training must keep in memory"),
    ],
)
def test_images_are_cached_if_they_fit_or_must_be(uris, cache, store, expected):
    config = TrainConfig(data="/d", output="/o", image_size=90, cache=cache)
    manifest = pa.table({"uri": [*uris, "/d/test.png"], "split": ["train"] * 3 + ["validation", "test"]})
    shares = share_out(config, Resources((Node(cpus=4, object_store_bytes=store),)))
    if isinstance(expected, bool):
        assert data.is_cached(config, manifest, shares) is expected
    else:
        with pytest.raises(ManifestError, match=expected):
            data.is_cached(config, manifest, shares)
