"""What a worker of a run asks of its images."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray.images import manifest as manifests
from cnnray.models.bundle import BundleInfo
from cnnray.training import epoch
from cnnray.training.feed import Feed
from cnnray.training.output import TrainingError
from cnnray.training.plan import Assignment
from tests.configs import decided


def test_images_in_parquet_that_were_in_memory_are_not_streamed_later(tmp_path, caplog):
    """Their order takes any image after any other."""
    table = pa.table({"image": [b""] * 20, "label": ["a", "b"] * 10})
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet", row_group_size=7)
    manifest = manifests.build_manifest(str(tmp_path / "0.parquet"), labelled=True)
    splits = pa.array(["train"] * 16 + ["validation"] * 4)
    manifest = manifest.set_column(manifest.column_names.index("split"), "split", splits)
    manifests.write(manifest, str(tmp_path / "manifest"))
    assignment = Assignment(
        config=decided(batch_size=4),
        info=BundleInfo(class_names=["a", "b"], image_size=32),
        manifest=str(tmp_path / "manifest"),
        weights=None,
        threads=1,
        decoders=1,
        uses_other_nodes=True,
        cached={},
        has_lanes=True,
        is_in_parquet=True,
        started=0.0,
        lease_holder=str(tmp_path),
    )
    feed = Feed(assignment, 0, 1, 4)
    try:
        assert (feed.order, feed.lanes) == (epoch.LANES, 12)
        assert "The training images lie in 3 row group(s) of Parquet files" in caplog.text
        feed.keep_order(epoch.LANES, 24)
        assert feed.lanes == 24
        with pytest.raises(TrainingError, match="This run began with its decoded images in memory"):
            feed.keep_order(epoch.ORDER, 1)
    finally:
        feed.close()
