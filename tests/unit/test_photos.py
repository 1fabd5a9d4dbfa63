"""The benchmark's images, and its plan for bare loops."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import photos, serve
from benchmarks.photos import Photos
from benchmarks.report import plan_bare_loops
from cnnray.cluster import Node, Resources
from cnnray.images.manifest import ManifestError


def test_photos_are_generated_once_and_are_equal_in_every_folder(tmp_path):
    first = Photos(folder=tmp_path / "a").manifest(6)
    assert len(first) == 6
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.jpg")}
    assert len(Photos(folder=tmp_path / "a").manifest(8)) == 8
    assert {path: path.stat().st_mtime_ns for path in times} == times
    photos.write(tmp_path / "b", 8)
    again = {path.name: path.read_bytes() for path in (tmp_path / "b").rglob("*.jpg")}
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").rglob("*.jpg")} == again


def test_a_sample_of_images_is_spread_over_all_of_them(tmp_path):
    source = photos.write(tmp_path / "photos", 20)
    uris = Photos(folder=tmp_path, data=str(source), images=5).manifest(1000)["uri"].to_pylist()
    assert len(uris) == 5
    assert len({uri.split("/")[-2] for uri in uris}) == 5
    assert len(Photos(folder=tmp_path, data=str(source)).manifest(1000)) == 20


def test_images_in_containers_are_refused_because_the_peers_cannot_read_them(tmp_path):
    file = next(photos.write(tmp_path / "photos", 1).rglob("*.jpg"))
    pq.write_table(pa.table({"image": [file.read_bytes()]}), tmp_path / "images.parquet")
    with pytest.raises(ManifestError, match="in containers"):
        Photos(folder=tmp_path, data=str(tmp_path / "images.parquet")).manifest(1)


def test_bare_loops_run_on_one_machine_and_are_scaled_to_the_clusters_cores(monkeypatch):
    monkeypatch.setattr("benchmarks.report.usable_cpus", lambda: 2)
    single = plan_bare_loops(Resources((Node(cpus=2),)))
    assert (single.processes, single.scale, single.label("a loop")) == (2, 1.0, "a loop")
    three = plan_bare_loops(Resources((Node(cpus=2), Node(cpus=2), Node(cpus=1))))
    assert (three.processes, three.scale, three.label("a loop")) == (2, 2.5, "a loop, times 2.5")


def test_the_benchmark_of_services_finds_the_job_that_it_starts():
    assert serve._JOB.is_file()
