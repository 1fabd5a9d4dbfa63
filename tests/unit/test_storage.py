"""Storage without a server of its own: local files, kinds of errors, credentials, processes."""

import errno
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from cnnray.errors import BadInputError, PermanentError, TransientError
from cnnray.images import object_stores, storage
from tests.races import create_at_once
from tests.s3_proxy import Proxy


@pytest.fixture
def s3(monkeypatch, tmp_path):
    """A proxy in front of moto, with a bucket `photos` and no credentials in the environment."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="photos")
    proxy = Proxy(f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    object_stores._store.cache_clear()
    yield proxy
    object_stores._store.cache_clear()
    proxy.close()
    server.stop()


@pytest.mark.parametrize(
    ("number", "error", "kind"),
    [
        (errno.ENOENT, storage.NotFoundError, PermanentError),
        (errno.ENOTDIR, storage.NotFoundError, PermanentError),
        (errno.EACCES, storage.DeniedError, PermanentError),
        (errno.EPERM, storage.DeniedError, PermanentError),
        (errno.ENOSPC, storage.StorageError, PermanentError),
        (errno.EIO, storage.UnavailableError, TransientError),
        (errno.EMFILE, storage.UnavailableError, TransientError),
        (errno.ENOTCONN, storage.UnavailableError, TransientError),
        (errno.ENAMETOOLONG, storage.BadFileError, BadInputError),
        (errno.ESTALE, storage.UnavailableError, TransientError),
        (errno.ETIMEDOUT, storage.UnavailableError, TransientError),
    ],
)
def test_errors_of_the_system_have_a_kind(number, error, kind, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", fail)
    for call in (lambda: storage.read_bytes(f"{tmp_path}/x"), lambda: storage.write_bytes(f"{tmp_path}/x", b"")):
        with pytest.raises(error, match=f"{tmp_path}/x") as raised:
            call()
        assert isinstance(raised.value, kind)


def test_a_local_file_is_never_seen_in_part(tmp_path):
    uri, stop, seen = f"{tmp_path}/file", threading.Event(), set()
    contents = [bytes([number]) * 3_000_000 for number in range(4)]
    storage.write_bytes(uri, contents[0])

    def read():
        while not stop.is_set():
            seen.add(storage.read_bytes(uri))

    thread = threading.Thread(target=read)
    thread.start()
    for content in contents * 3:
        storage.write_bytes(uri, content)
    stop.set()
    thread.join()
    assert seen <= set(contents)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_of_eight_creators_one_succeeds_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def link(source, target):  # as on SMB and mounted buckets
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    for race in range(20):
        uri = f"{tmp_path}/{race}"
        created = create_at_once(uri)
        assert created.count(True) == 1
        assert storage.read_bytes(uri) == b"%d" % created.index(True)
    assert len(list(tmp_path.iterdir())) == 20


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    uri = f"{tmp_path}/file"
    storage.write_bytes(uri, b"old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(storage.StorageError, match="No space left on device"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("uri", ["ftp://x/y", "s3://", "gs:///x"])
def test_addresses_that_name_nothing(uri):
    with pytest.raises(storage.StorageError, match=uri):
        storage.absolute(uri)


def test_keys_of_a_profile_are_renewed(s3, tmp_path, monkeypatch):
    expiry = (datetime.now(UTC) + timedelta(minutes=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
    count = tmp_path / "count"
    (tmp_path / "keys.sh").write_text(
        f"""echo x >> {count}
        echo '{{"Version": 1, "AccessKeyId": "KEY'$(wc -l < {count})'", "SecretAccessKey": "s", "SessionToken": "t",
               "Expiration": "{expiry}"}}'"""
    )
    (tmp_path / "config").write_text(f"[profile photos]\ncredential_process = sh {tmp_path}/keys.sh\n")
    monkeypatch.setenv("AWS_PROFILE", "photos")
    storage.write_bytes("s3://photos/1.png", b"one")
    s3.expired_keys = {f"KEY{number}" for number in range(1, len(count.read_text().splitlines()) + 1)}
    assert storage.read_bytes("s3://photos/1.png") == b"one"
    assert not s3.fault_counts["expire"]


def test_a_profile_is_read_without_its_name_in_the_environment(s3, tmp_path):
    (tmp_path / "credentials").write_text("[default]\naws_access_key_id = KEY\naws_secret_access_key = s\n")
    storage.write_bytes("s3://photos/1.png", b"one")
    s3.expired_keys = {"KEY"}
    with pytest.raises(
        storage.CredentialsError, match=r"accept the credentials for s3://photos/1.png \(ExpiredToken\)"
    ):
        storage.read_bytes("s3://photos/1.png")


def test_keys_in_the_environment_need_no_boto3(s3):
    program = (
        "import sys; from cnnray.images import storage; storage.write_bytes('s3://photos/1.png', b'one');"
        "print([name for name in ('boto3', 'botocore') if name in sys.modules], storage.read_bytes('s3://photos/1.png'))"
    )
    keys = {"AWS_ACCESS_KEY_ID": "KEY", "AWS_SECRET_ACCESS_KEY": "s"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, env=os.environ | keys, capture_output=True, text=True, check=True).stdout
    assert printed == "[] b'one'\n"


def test_a_forked_process_gets_a_sentence(s3, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    storage.write_bytes("s3://photos/1.png", b"one")
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            storage.read_bytes("s3://photos/1.png")
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1000) == b"s3://photos/1.png cannot be used in a forked process; start it with 'spawn'."
