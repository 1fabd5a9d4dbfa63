"""Leases on S3: a run whose lease is lost writes nothing more."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import pytest

from cnnray.images import lease, object_stores, storage
from cnnray.training.config import TrainConfig
from cnnray.training.job import train

pytestmark = pytest.mark.s3


@pytest.fixture
def fast_leases(monkeypatch, new_clients):
    """Leases with heartbeats of 0.3 s."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.3)
    options = {"client_options": {"timeout": "0.2s", "allow_http": True}, "retry_config": {"max_retries": 0}}
    monkeypatch.setattr(object_stores, "_QUICK_OPTIONS", options)


def test_writes_wait_while_a_lease_cannot_be_renewed(bucket, s3_proxy, fast_leases, monkeypatch):
    output = f"{bucket}/run"
    with lease.lease(output) as held, ThreadPoolExecutor(1) as pool:
        storage.write_bytes(f"{output}/1", b"x")
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: "stall" if path.endswith(".lock") else None)
        time.sleep(1.0)
        write = pool.submit(storage.write_bytes, f"{output}/2", b"x")
        with pytest.raises(TimeoutError):
            write.result(0.7)
        assert not storage.is_file(f"{output}/2")
        storage.write_bytes(f"{output}2/1", b"x")  # another folder
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: None)
        write.result(10)
        assert storage.is_file(f"{output}/2")
        held.raise_if_lost()
    assert not storage.exists(f"{output}/.lock")


def test_writes_fail_when_a_lease_cannot_be_renewed_for_long(bucket, s3_proxy, fast_leases, monkeypatch):
    monkeypatch.setattr(lease, "_MAX_WAIT_SECONDS", 0.5)
    with lease.lease(f"{bucket}/run"):
        monkeypatch.setattr(s3_proxy, "faults", lambda method, path, _: "stall" if path.endswith(".lock") else None)
        time.sleep(1.0)
        with pytest.raises(storage.UnavailableError, match="could not be renewed"):
            storage.write_bytes(f"{bucket}/run/1", b"x")


def test_a_run_that_lost_its_lease_writes_nothing_more(bucket, fast_leases):
    output, s3 = f"{bucket}/run", boto3.client("s3")
    name = bucket.removeprefix("s3://")
    with lease.lease(output) as held:
        storage.write_bytes(f"{output}/1", b"x")
        # A renewal whose answer was lost does not end the run.
        s3.put_object(Bucket=name, Key="run/.lock", Body=f"{held.holder} 99".encode())
        time.sleep(1.0)
        held.raise_if_lost()
        lease.check_holder(output, held.holder)
        s3.put_object(Bucket=name, Key="run/.lock", Body=b"another 0")
        deadline = time.monotonic() + 20  # a renewal may be slow
        while held._version is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(lease.LeaseLostError, match="Another run has taken over"):
            held.raise_if_lost()
        with pytest.raises(lease.LeaseLostError):
            lease.check_holder(output, held.holder)  # in another process of the run
        for write in (
            lambda: storage.write_bytes(f"{output}/2", b"x"),
            lambda: storage.delete_file(f"{output}/1"),
            lambda: storage.delete_folder(f"{output}/1"),
            lambda: storage.copy_folder(output, f"{output}/copy"),
        ):
            with pytest.raises(lease.LeaseLostError):
                write()
    assert {file.uri for file in storage.files(output)} == {f"{output}/1"}
    assert storage.read_bytes(f"{output}/.lock") == b"another 0"


def test_a_training_that_lost_its_lease_ends(bucket, digits, monkeypatch):
    storage.copy_folder(str(digits), f"{bucket}/digits")
    output, name = f"{bucket}/run", bucket.removeprefix("s3://")
    config = TrainConfig(
        data=f"{bucket}/digits",
        output=output,
        architecture="small_cnn",
        image_size=16,
        epochs=500,
        max_workers=1,
        cpus_per_worker=0.5,
        data_checks=False,
    )

    def take_over():
        while not storage.is_file(f"{output}/history.csv"):
            time.sleep(0.2)
        boto3.client("s3").put_object(Bucket=name, Key="run/.lock", Body=b"another 0")

    thread = threading.Thread(target=take_over)
    thread.start()
    with pytest.raises(lease.LeaseLostError, match=f"Another run has taken over {output}"):
        train(config)
    thread.join()
    checkpoints = [file.uri for file in storage.files(f"{output}/checkpoints")]
    time.sleep(2)
    assert [file.uri for file in storage.files(f"{output}/checkpoints")] == checkpoints
    assert storage.read_bytes(f"{output}/.lock") == b"another 0"
