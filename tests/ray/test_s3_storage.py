"""Storage is the same on S3 as on a local path: against moto, and against Ceph's gateway by `make test-s3`."""

import pickle
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cnnray.images import containers, inputs, lease, object_stores, shards, storage, tree
from cnnray.images.decoders import Decoders
from cnnray.images.geometry import Geometry
from cnnray.images.manifest import ManifestError, build_manifest
from tests.awkward import awkward_images
from tests.conftest import write_tar
from tests.races import create_at_once
from tests.unit import test_layouts as layouts

pytestmark = pytest.mark.s3


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return request.getfixturevalue("bucket") + "/some/prefix" if request.param == "s3" else str(tmp_path)


def test_globs_find_the_same_files(root):
    for name in layouts.FILES:
        storage.write_bytes(storage.join(root, name), b"x")
    for pattern, expected in layouts.GLOBS.items():
        assert layouts.glob(root, pattern) == expected, pattern


def test_a_folder_that_exists_is_no_glob(root):
    for name in ("Photos [2023]/cat/1.png", "Photos [2023]/dog/1.png", "Photos 2/cat/9.png"):
        storage.write_bytes(storage.join(root, name), b"x")
    assert build_manifest(f"{root}/Photos [2023]", labelled=True)["label"].to_pylist() == ["cat", "dog"]
    assert layouts.glob(root, "Photos [2023]/*/*.png") == ["Photos [2023]/cat/1.png", "Photos [2023]/dog/1.png"]
    assert layouts.glob(root, "Photos [0-9]/**") == ["Photos 2/cat/9.png"]


def test_write_read_list_copy_delete(root, tmp_path_factory):
    files = {"a/1.png": b"one", "a/b/2.png": b"two", "c.txt": b"", ".hidden/x": b"x", "a/.y": b"y"}
    for name, data in files.items():
        storage.write_bytes(storage.join(root, name), data)
    assert storage.read_bytes(f"{root}/a/1.png") == b"one"
    listing = storage.files(root)
    assert [(file.uri.removeprefix(root + "/"), file.size) for file in listing] == [
        ("a/1.png", 3), ("a/b/2.png", 3), ("c.txt", 0),
    ]  # fmt: skip
    assert storage.folders(root) == [f"{root}/a"]
    assert storage.exists(f"{root}/a")
    assert storage.is_file(f"{root}/c.txt")
    assert not storage.is_file(f"{root}/a")
    assert not storage.exists(f"{root}/nothing")
    copied = str(tmp_path_factory.mktemp("copy"))
    storage.copy_folder(root, copied, last=["c.txt"])
    storage.copy_folder(copied, f"{root}/again")
    assert storage.read_bytes(f"{root}/again/a/b/2.png") == b"two"
    storage.delete_folder(f"{root}/a")
    storage.delete_file(f"{root}/c.txt")
    storage.delete_file(f"{root}/c.txt")
    assert [file.uri for file in storage.files(f"{root}/again")] == [
        f"{root}/again/{name}" for name in ("a/1.png", "a/b/2.png", "c.txt")
    ]
    assert not storage.exists(f"{root}/a")


def test_errors_name_the_file(root):
    storage.write_bytes(f"{root}/five", b"12345")
    with pytest.raises(FileNotFoundError, match="nothing"):
        storage.read_bytes(f"{root}/nothing")
    with pytest.raises(OverflowError, match="5 bytes, at most 4"):
        storage.read_bytes(f"{root}/five", max_bytes=4)
    assert storage.read_bytes(f"{root}/five", max_bytes=5) == b"12345"


def test_more_objects_than_one_page(bucket):
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{bucket}/{'ab'[i % 2]}/{i:04d}.png", b"x"), range(2100)))
    manifest = build_manifest(bucket, labelled=True)
    assert len(manifest) == 2100
    assert manifest["label"].to_pylist() == ["a"] * 1050 + ["b"] * 1050
    assert len(build_manifest(f"{bucket}/*/00*.png", labelled=False)) == 100
    assert [file.uri for file in storage.files(f"{bucket}/a")] == manifest["uri"].to_pylist()[:1050]


def test_missing_bucket_and_empty_prefix(bucket):
    with pytest.raises((ManifestError, OSError), match="does not exist"):
        build_manifest("s3://cnnray-there-is-no-such-bucket", labelled=True)
    with pytest.raises(ManifestError, match="does not exist"):
        build_manifest(f"{bucket}/nothing", labelled=True)


def test_no_credentials_get_a_sentence(bucket, new_clients, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    (tmp_path / "config").write_text("[default]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(storage.DeniedError, match="No AWS credentials were found"):
        storage.read_bytes(f"{bucket}/x")


def test_an_unreachable_server_gets_a_sentence(bucket, new_clients, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(storage.UnavailableError, match="cannot be reached"):
        storage.read_bytes(f"{bucket}/x")


@pytest.mark.parametrize(
    ("fault", "error", "sentence"),
    [
        ("deny", storage.DeniedError, r"S3 denies access to s3://.*/one \(AccessDenied\)\."),
        (
            "expire",
            storage.CredentialsError,
            r"S3 does not accept the credentials for s3://.*/one \(ExpiredToken\)\.",
        ),
        ("throttle", storage.ThrottledError, "S3 asks for fewer requests, at s3://.*/one after several tries"),
        ("break off", storage.UnavailableError, "S3 cannot be reached for s3://.*/one: "),
    ],
)
def test_refusals_are_of_their_kind(fault, error, sentence, bucket, s3_proxy, monkeypatch):
    storage.write_bytes(f"{bucket}/one", b"content" * 1000)
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: fault)
    with pytest.raises(error, match=sentence):
        storage.read_bytes(f"{bucket}/one")
    with pytest.raises(error if fault != "break off" else storage.UnavailableError):
        storage.files(bucket)


def test_a_body_that_breaks_off_is_read_on(bucket, s3_proxy, monkeypatch):
    data = bytes(range(256)) * 1000
    storage.write_bytes(f"{bucket}/one", data)
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: "break off" if before < 2 else None)
    assert storage.read_bytes(f"{bucket}/one") == data
    assert s3_proxy.fault_counts["break off"] >= 2


def test_an_answer_that_breaks_off_is_asked_for_again(bucket, s3_proxy, monkeypatch):
    monkeypatch.setattr(tree, "PAGE", 10)
    uris = [f"{bucket}/f/{number:02}" for number in range(25)]
    for uri in uris:
        storage.write_bytes(uri, b"1")
    s3_proxy.forget_requests()
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: "break off" if before < 2 else None)
    assert [file.uri for file in storage.files(f"{bucket}/f")] == uris
    assert storage.folders(bucket) == [f"{bucket}/f"]
    with pytest.raises(storage.NotFoundError):
        storage.read_bytes(f"{bucket}/f/none")
    assert storage.write_if(uris[0], b"2", None) is None
    storage.delete_file(uris[0])
    storage.delete_folder(f"{bucket}/f")
    assert s3_proxy.fault_counts["break off"] >= 10
    assert not storage.exists(f"{bucket}/f")


def test_one_run_at_a_time(bucket, monkeypatch):
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.3)
    with (
        lease.lease(f"{bucket}/run"),
        pytest.raises(lease.OutputInUseError, match="Another run is writing"),
        lease.lease(f"{bucket}/run"),
    ):
        pass
    assert not storage.exists(f"{bucket}/run")
    # The lease of a killed run is taken over.
    storage.write_bytes(f"{bucket}/run/.lock", b"killed 7")
    with lease.lease(f"{bucket}/run"):
        assert storage.read_bytes(f"{bucket}/run/.lock") != b"killed 7"


def test_of_two_writers_one_succeeds(bucket):
    uri = f"{bucket}/one"
    assert storage.version(uri) is None
    first = storage.write_if(uri, b"first", None)
    assert first == storage.version(uri) is not None
    assert storage.write_if(uri, b"late", None) is None
    second = storage.write_if(uri, b"second", first)
    assert storage.write_if(uri, b"late", first) is None
    assert storage.read_bytes(uri) == b"second"
    storage.delete_file(uri)
    assert storage.write_if(uri, b"late", second) is None
    with pytest.raises(FileNotFoundError):
        storage.write_if("s3://cnnray-there-is-no-such-bucket/one", b"x", None)


@pytest.mark.parametrize("existing", [False, True])
def test_of_eight_writers_at_the_same_time_one_succeeds(existing, bucket):
    for race in range(5):
        uri = f"{bucket}/{race}"
        if existing:
            storage.write_bytes(uri, b"before")
        before, start = storage.version(uri), threading.Barrier(8)

        def write(number, uri=uri, before=before, start=start):
            start.wait()
            return storage.write_if(uri, f"{number}".encode(), before)

        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(write, range(8)))
        (winner,) = (number for number, version in enumerate(written) if version)
        assert storage.read_bytes(uri) == f"{winner}".encode()
        assert storage.version(uri) == written[winner]


def test_a_large_file_arrives_whole(bucket):
    data = np.random.default_rng(0).bytes(40_000_000)  # three parts
    storage.write_bytes(f"{bucket}/large", data)
    assert storage.read_bytes(f"{bucket}/large") == data
    filesystem, path = storage.arrow_filesystem(f"{bucket}/large-too")
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)
    assert storage.read_bytes(f"{bucket}/large-too") == data


def test_objects_that_stand_for_folders_are_no_files(bucket):
    s3, name = boto3.client("s3"), bucket.removeprefix("s3://")
    for key in ("a/", "a/b/", "a/b/1.png", "a/b-c/2.png", "empty/"):
        s3.put_object(Bucket=name, Key=key, Body=b"x" if key.endswith(".png") else b"")
    assert [file.uri for file in storage.files(bucket)] == [f"{bucket}/a/b-c/2.png", f"{bucket}/a/b/1.png"]
    assert [file.uri for file in storage.files(f"{bucket}/a")] == [f"{bucket}/a/b-c/2.png", f"{bucket}/a/b/1.png"]
    assert storage.folders(bucket) == [f"{bucket}/a", f"{bucket}/empty"]
    assert not storage.exists(f"{bucket}/empty")
    s3.put_object(Bucket=name, Key="a/b//3.png", Body=b"x")
    with pytest.raises(storage.StorageError, match=r"a/b//3\.png"):
        storage.files(bucket)


@pytest.mark.parametrize("flat", [False, True])
def test_walks_are_in_the_order_of_uris(flat, bucket, monkeypatch):
    monkeypatch.setattr(tree, "PAGE", 5)
    monkeypatch.setattr(tree, "_FEW_FILES", 1)
    names = [f"{folder}{number}.png" for folder in ("a/", "a-b/", "a/b/", "b", "é/", "b/") for number in range(7)]
    names += [f"{number:02}.png" for number in range(80 * flat)] + ["a.png", "c", "b!.png", ".h/1.png", "a/.h/1.png"]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_bytes(f"{bucket}/r/{name}", name.encode()), names))
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="r/a/", Body=b"")
    files = list(storage.walk(f"{bucket}/r"))
    assert [file.uri for file in files] == sorted(f"{bucket}/r/{name}" for name in names if "/." not in f"/{name}")
    assert files == storage.files(f"{bucket}/r")
    assert storage.stored_file(files[3].uri) == files[3]
    assert '"' not in files[3].version
    storage.write_bytes(files[3].uri, b"other")
    assert storage.stored_file(files[3].uri).version != files[3].version


def test_a_walk_that_is_not_read_on_lists_no_more(bucket, s3_proxy, monkeypatch):
    monkeypatch.setattr(tree, "PAGE", 5)
    monkeypatch.setattr(tree, "_FEW_FILES", 1)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda i: storage.write_bytes(f"{bucket}/{i % 3}/{i:04d}.png", b"x"), range(600)))
    lists, before = [], set(threading.enumerate())
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: lists.append(path))
    walk = storage.walk(bucket)
    assert next(walk).uri == f"{bucket}/0/0000.png"
    time.sleep(1)
    assert len(lists) <= 3 + 3 * 6  # of 120 pages
    walk.close()
    new = set(threading.enumerate()) - before
    assert [thread for thread in new if "process_request" not in thread.name] == []  # but the proxy's


def test_many_small_folders_are_listed_in_one_go(bucket, s3_proxy, monkeypatch):
    monkeypatch.setattr(tree, "PAGE", 100)
    names = [f"{number:03d}/image.png" for number in range(250)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write_bytes(f"{bucket}/r/{name}", b"x"), names))
    lists = []
    monkeypatch.setattr(s3_proxy, "faults", lambda method, path, before: lists.append(path))
    assert [file.uri for file in storage.walk(f"{bucket}/r")] == [f"{bucket}/r/{name}" for name in names]
    assert len(lists) <= 3


def test_a_conflict_of_two_creators_is_tried_again(bucket, s3_proxy, monkeypatch):
    requests = []

    def faults(method, path, before):
        requests.append(method)
        return "conflict" if method == "PUT" and requests.count("PUT") == 1 else None

    monkeypatch.setattr(s3_proxy, "faults", faults)
    assert storage.create(f"{bucket}/one", b"1")
    assert s3_proxy.fault_counts["conflict"]
    assert storage.read_bytes(f"{bucket}/one") == b"1"


def test_of_eight_creators_one_succeeds(bucket):
    for race in range(5):
        uri = f"{bucket}/{race}"
        created = create_at_once(uri)
        assert created.count(True) == 1
        assert storage.read_bytes(uri) == b"%d" % created.index(True)
    large = b"1" * 20_000_000  # otherwise written in parts
    assert storage.create(f"{bucket}/large", large)
    assert not storage.create(f"{bucket}/large", b"2" * 20_000_000)
    assert storage.read_bytes(f"{bucket}/large") == large


def test_shards_of_a_manifest_are_read_by_ranges(bucket):
    table = pa.table({"uri": [f"/{number:04d}.png" for number in range(100)]})
    written = list(shards.write(f"{bucket}/m", [table], rows_per_range=10, generation=1))
    assert list(shards.ranges(f"{bucket}/m")) == written
    assert shards.read(f"{bucket}/m", written[4])["uri"].to_pylist() == table["uri"].to_pylist()[40:50]
    assert shards.last_row(f"{bucket}/m") == (100, "/0099.png")
    assert shards.read_facts(f"{bucket}/m") is None
    shards.finish(f"{bucket}/m")
    assert shards.read_facts(f"{bucket}/m") == {}


def test_tables_in_a_bucket_are_streams(bucket):
    storage.write_bytes(f"{bucket}/x.csv", b"uri,who\n1.png,me\n/2.png,you\n")
    storage.write_bytes(f"{bucket}/x.jsonl", b'{"uri": "1.png", "who": "me"}\n{"uri": "/2.png", "who": "you"}\n')
    for kind in ("csv", "jsonl"):
        table = pa.concat_tables(inputs.open_input(f"{bucket}/x.{kind}").tables)
        assert table.to_pydict() == {
            "uri": [f"{bucket}/1.png", "/2.png"], "who": ["me", "you"], inputs.VERSION: [None, None],
        }  # fmt: skip


def test_keys_are_taken_as_they_are(bucket):
    names = ["ü #1.png", "100%.png", "a%20b.png", "x&y=[z]?*~.png", "quote'\".png"]
    for name in names:
        storage.write_bytes(f"{bucket}/odd/{name}", name.encode())
    assert [file.uri for file in storage.files(f"{bucket}/odd")] == sorted(f"{bucket}/odd/{name}" for name in names)
    assert [storage.read_bytes(file.uri).decode() for file in storage.files(f"{bucket}/odd")] == sorted(names)
    keys = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert sorted(item["Key"] for item in keys) == sorted(f"odd/{name}" for name in names)


def test_a_process_makes_one_client_for_a_bucket(bucket, tmp_path, new_clients, monkeypatch):
    contents = {f"{number}.png": b"data" for number in range(5)}
    write_tar(tmp_path / "0.tar", contents)
    pyarrow.parquet.write_table(
        pa.table({"bytes": list(contents.values())}), tmp_path / "0.parquet", row_group_size=1
    )
    storage.copy_folder(str(tmp_path), bucket)
    clients = Counter()
    remote = object_stores.from_url

    class Counted(object_stores._ArrowS3):
        def __init__(self, *arguments):
            clients["pyarrow"] += 1
            super().__init__(*arguments)

    def counted(*arguments, **options):
        clients["obstore"] += 1
        return remote(*arguments, **options)

    monkeypatch.setattr(object_stores, "_ArrowS3", Counted)
    monkeypatch.setattr(object_stores, "from_url", counted)
    object_stores._store.cache_clear()
    object_stores._arrow_filesystem.cache_clear()
    for _ in range(3):
        uris = build_manifest(bucket, labelled=False)["uri"].to_pylist()
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda uri: list(containers.encoded([uri])), uris))
        assert read == [[b"data"]] * 10
        for file in storage.files(bucket):
            storage.read_bytes(file.uri)
    assert clients == {"pyarrow": 1, "obstore": 1}
    object_stores._arrow_filesystem.cache_clear()
    filesystem = storage.arrow_filesystem(bucket)[0]
    assert pickle.loads(pickle.dumps(filesystem)) is filesystem


def test_members_in_random_order_are_read_side_by_side(s3_proxy, bucket, tmp_path, monkeypatch):
    image = awkward_images()["rgb.png"]
    write_tar(tmp_path / "x.tar", {f"{number:02d}.png": image for number in range(32)})
    storage.write_bytes(f"{bucket}/x.tar", (tmp_path / "x.tar").read_bytes())
    (rows,) = containers.list_rows(f"{bucket}/x.tar")
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(32)))
    requests = Counter()

    def slow(method, path, before):
        requests[method] += 1
        return "slow"

    monkeypatch.setattr(s3_proxy, "faults", slow)
    decoding = Decoders(1, Geometry.of(8), largest_batch=32)
    try:
        started = time.monotonic()
        (batch,) = decoding.batches(lambda _: rows, 1)
        seconds = time.monotonic() - started
    finally:
        decoding.close()
    assert not any(batch["error"])
    # One after another they would take 32 seconds, and half of them could be neighbours by chance.
    assert 16 <= requests["GET"] <= 32
    assert requests["HEAD"] <= 16  # one for each thread that opens the file before any other has
    assert seconds < 15
