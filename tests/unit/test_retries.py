"""Images while storage is in trouble: read again, and never taken for bad ones."""

import errno
import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from cnnray.images import containers, lease, parquet, reading, retries, storage, tar
from cnnray.images.decode import BadImage
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import build_manifest, manifest_from_uris
from tests.conftest import write_tar

THROTTLED = storage.ThrottledError("S3 asks for fewer requests, at s3://a/1.png.")


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts, which take no time."""
    taken, clock = [], [0.0]

    def sleep(seconds):
        taken.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(retries.time, "sleep", sleep)
    monkeypatch.setattr(retries.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(retries.random, "uniform", lambda low, high: 1.0)
    monkeypatch.setattr(retries, "_logged_at", {})
    monkeypatch.setattr(retries, "_given_up", set())
    monkeypatch.setenv("CNNRAY_STORAGE_RETRY_SECONDS", "100")
    return taken


@pytest.fixture
def answers(monkeypatch):
    """What the next reads of storage give: bytes, or an error to raise."""
    queue = []

    def read_bytes(uri, max_bytes=None, quick=False):
        answer = queue.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    return queue


def test_images_are_read_again_after_growing_pauses(pauses, answers, caplog):
    answers += [THROTTLED, storage.UnavailableError("No answer."), storage.CredentialsError("Expired."), b"image"]
    assert reading.load_bytes("s3://a/1.png") == b"image"
    assert pauses == [1.0, 2.0, 4.0]
    assert caplog.messages == [f"{THROTTLED} Trying again for 100 s."]


def test_a_worker_waits_to_see_whether_its_run_has_the_lease(pauses, answers):
    answers += [storage.UnavailableError("No answer."), b"holder since today", b"another since today"]
    lease.check_holder("s3://a/out", "holder")
    assert pauses == [1.0]
    with pytest.raises(lease.LeaseLostError):
        lease.check_holder("s3://a/out", "holder")
    assert pauses == [1.0]


def test_trouble_of_a_bucket_is_logged_once_a_minute(pauses, answers, caplog):
    for number in range(100):
        answers += [THROTTLED, b"image"]
        reading.load_bytes(f"s3://a/{number}.png")  # pauses for a second
    answers += [THROTTLED, b"image"]
    reading.load_bytes("s3://b/1.png")
    assert len(caplog.messages) == 2 + 1


def test_trouble_that_stays_is_raised_and_the_next_images_do_not_wait(pauses, answers):
    answers += [THROTTLED] * 100
    with pytest.raises(storage.ThrottledError):
        reading.load_bytes("s3://a/1.png")
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 37.0]
    left = len(answers)
    with pytest.raises(storage.ThrottledError):
        reading.load_bytes("s3://a/2.png")
    assert len(answers) == left - 1
    assert len(pauses) == 7
    # Another bucket is not concerned, and an answer ends the trouble.
    answers[:] = [THROTTLED, b"image", b"image", THROTTLED, b"image"]
    for uri in ("s3://b/1.png", "s3://a/3.png", "s3://a/4.png"):
        assert reading.load_bytes(uri) == b"image"
    assert len(pauses) == 9


@pytest.mark.parametrize("text", ["5 min", "-1", "nan", "inf"])
def test_a_time_that_is_no_number_of_seconds_is_refused(text, pauses, answers, monkeypatch):
    monkeypatch.setenv("CNNRAY_STORAGE_RETRY_SECONDS", text)
    answers.append(THROTTLED)
    with pytest.raises(storage.StorageError, match=f"CNNRAY_STORAGE_RETRY_SECONDS is '{text}'; expected a number"):
        reading.load_bytes("s3://a/1.png")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (storage.NotFoundError("s3://a/1.png does not exist."), "missing"),
        (storage.DeniedError("S3 denies access to s3://a/1.png (AccessDenied)."), "access denied"),
        (storage.TooLargeError("9 bytes, at most 8"), "too large"),
        (storage.BadFileError("s3://a/1.png is not a file."), "unreadable"),
        (ValueError("embedded null byte"), "unreadable"),
    ],
)
def test_a_file_that_is_itself_at_fault_is_a_bad_image(error, reason, pauses, answers):
    answers.append(error)
    with pytest.raises(BadImage) as raised:
        reading.load_bytes("s3://a/1.png")
    assert str(raised.value) == f"{reason}: {error}"
    assert not pauses


@pytest.mark.parametrize("kind", [storage.NoBucketError, storage.StorageError])
def test_trouble_that_no_pause_ends_is_raised_at_once(kind, pauses, answers):
    answers.append(kind("The bucket of s3://a/1.png does not exist."))
    with pytest.raises(kind):
        reading.load_bytes("s3://a/1.png")
    assert not pauses


def test_rows_whose_storage_is_in_trouble_are_marked_or_fail(pauses, answers, monkeypatch):
    monkeypatch.setenv("CNNRAY_STORAGE_RETRY_SECONDS", "0")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    good = buffer.getvalue()
    table = manifest_from_uris([f"s3://a/{number}.png" for number in range(4)])
    answers += [good, THROTTLED, good[:50], good]
    (block,) = reading.decoded_blocks(table, Geometry.of(8), 4, threads=1, keep_unavailable=True)
    errors = pa.chunked_array([pa.array(block["error"], pa.string())])
    assert reading.is_unavailable(errors).to_pylist() == [False, True, False, False]
    assert errors[1].as_py() == f"unavailable: {THROTTLED}"
    assert [error.partition(":")[0] for error in block["error"]] == ["", "unavailable", "corrupt", ""]
    assert (block["image"][[0, 3]] == [255, 0, 0]).all()
    answers += [good, THROTTLED, good, good]
    with pytest.raises(storage.ThrottledError):
        list(reading.decoded_blocks(table, Geometry.of(8), 4, threads=1))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_container_is_read_on_where_it_failed(kind, pauses, tmp_path, monkeypatch):
    contents = {f"{number}.png": bytes([number]) * 100 for number in range(40)}
    file = tmp_path / f"0.{kind}"
    if kind == "tar":
        write_tar(file, contents)
    else:
        pa.parquet.write_table(pa.table({"bytes": list(contents.values())}), file)
    uris = build_manifest(str(file), labelled=False)["uri"].to_pylist()
    module = tar if kind == "tar" else parquet
    read, places = module.images, []

    def fail_often(*arguments, **options):
        places.append(len(arguments[-1]))
        for number, data in enumerate(read(*arguments, **options)):
            if number == 7 and len(places) < 4:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            yield data

    monkeypatch.setattr(module, "images", fail_often)
    assert list(containers.encoded(uris)) == list(contents.values())
    assert places == [40, 33, 26, 19]
    assert pauses == [1.0, 1.0, 1.0]


def test_a_file_that_is_no_file_and_a_damaged_container_are_bad_images(tmp_path, pauses):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadImage, match=r"unreadable: .*folder\.png is not a file"):
        reading.load_bytes(str(tmp_path / "folder.png"))
    with pytest.raises(BadImage, match=r"unreadable: .*File name too long"):
        reading.load_bytes("/" + "x" * 300)
    data = np.random.default_rng(0).bytes(100_000)
    file = tmp_path / "0.parquet"
    pa.parquet.write_table(pa.table({"bytes": [data] * 4}), file, compression="snappy")
    uris = build_manifest(str(file), labelled=False)["uri"].to_pylist()
    damaged = bytearray(file.read_bytes())
    damaged[:40] = b"\xff" * 40
    file.write_bytes(damaged)
    assert [error.reason for error in containers.encoded(uris)] == ["unreadable"] * 4
    assert not pauses
