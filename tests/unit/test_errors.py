"""Errors that a user gets as one sentence: their kinds, pickling, and what a job prints."""

import importlib
import json
import pickle
import pkgutil
import tempfile

import pyarrow as pa
import pytest

import cnnray
from cnnray import commandline, errors
from cnnray.evaluation.comparison import UndecidedError
from cnnray.images import storage
from cnnray.images.decode import BadImage
from cnnray.images.manifest import ManifestError
from cnnray.serving.bodies import RequestError

KINDS = (errors.TransientError, errors.PermanentError, errors.BadInputError)
ARGUMENTS = {BadImage: ("corrupt", "it ends early"), RequestError: (413, "It is too long.")}


@pytest.fixture(autouse=True)
def this_process_stays_as_it_is(monkeypatch):
    """Undo the signal handlers and the two variables that `commandline.ending` sets."""
    monkeypatch.setattr(commandline.signal, "signal", lambda *arguments: None)
    for name in ("RAY_DEDUP_LOGS_SKIP_REGEX", "RAY_COLOR_PREFIX"):
        monkeypatch.setenv(name, "")


def _subclasses(kind):
    return [error for child in kind.__subclasses__() for error in (child, *_subclasses(child))]


def _all_errors():
    for module in pkgutil.walk_packages(cnnray.__path__, "cnnray."):
        if "benchmarks" not in module.name:
            importlib.import_module(module.name)
    return sorted({*_subclasses(errors.CnnrayError)} - {*KINDS}, key=lambda error: error.__qualname__)


def test_each_is_of_one_kind_and_can_be_pickled():
    classes = _all_errors()
    assert len(classes) > 15
    for cls in classes:
        assert sum(issubclass(cls, kind) for kind in KINDS) == 1, cls
        error = cls(*ARGUMENTS.get(cls, ("One sentence.",)))
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (cls, str(error), vars(error))


def _run(job, output=None, code=commandline.EXIT_FAILURE):
    """What a job writes to stderr, and the last line of it."""
    ending = commandline.ending(job, output)
    assert (ending.code, ending.out) == (code, "")
    return ending.err, ending.err.splitlines()[-1]


def _raising(error):
    def job_that_fails():
        raise error

    return job_that_fails


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ManifestError("No images."), 1), (storage.NotFoundError("x does not exist."), 1),
        (UndecidedError("Undecided."), 3),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_leaves_nothing(error, code, tmp_path):
    err, _ = _run(_raising(error), str(tmp_path / "out"), code)
    assert err == f"Error: {error}\n"
    assert not (tmp_path / "out").exists()


UNEXPECTED = {
    "OSError: No space left.": OSError("No space left."),
    "ArrowInvalid: Not a Parquet file.": pa.ArrowInvalid("Not a Parquet file."),
    "JSONDecodeError: not JSON: line 1 column 1 (char 0)": json.JSONDecodeError("not JSON", "x", 0),
    "KeyError: 'x'": KeyError("x"),
    "RuntimeError: last": RuntimeError("first\nlast"),
    "RuntimeError: RuntimeError": RuntimeError(),
}


@pytest.mark.parametrize("sentence", UNEXPECTED)
def test_the_trace_of_another_error_is_in_the_output(sentence, tmp_path):
    log = tmp_path / "out" / "error.log"
    err, _ = _run(_raising(UNEXPECTED[sentence]), str(tmp_path / "out"))
    assert err == f"Error: {sentence} (The trace is in {log}.)\n"
    assert "in job_that_fails\n" in log.read_text()
    assert f"cnnray {cnnray.__version__}" in log.read_text()


def test_an_error_with_a_cause_keeps_its_sentence_and_the_trace_of_both(tmp_path):
    def job():
        try:
            _raising(ZeroDivisionError("division by zero"))()
        except ZeroDivisionError as error:
            raise ManifestError("It failed.") from error

    err, _ = _run(job, str(tmp_path))
    assert err == f"Error: It failed. (The trace is in {tmp_path / 'error.log'}.)\n"
    text = (tmp_path / "error.log").read_text()
    assert text.index("in job_that_fails\n") < text.index("ManifestError: It failed.")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_log_that_the_output_does_not_take_is_in_the_temporary_folder(temporary, tmp_path):
    (tmp_path / "file").touch()
    for output in (None, str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        _, last = _run(_raising(KeyError("x")), output)
        (log,) = temporary.iterdir()
        assert last.endswith(f"(The trace is in {log}.)")
        assert "in job_that_fails\n" in log.read_text()
        log.unlink()
    assert (tmp_path / "file").read_bytes() == b""


def test_a_bucket_gets_the_log_unless_it_is_the_trouble(temporary, monkeypatch):
    written = {}
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: written.update({uri: data}))
    _run(_raising(KeyError("x")), "s3://bucket/out")
    assert list(written) == ["s3://bucket/out/error.log"]
    written.clear()
    throttled = storage.ThrottledError("S3 asks for fewer requests.")
    throttled.__cause__ = RuntimeError("of Ray")
    _, last = _run(_raising(throttled), "s3://bucket/out")
    (log,) = written
    assert log.startswith(str(temporary))
    assert last == f"Error: S3 asks for fewer requests. (The trace is in {log}.)"


def test_where_no_log_can_be_written_the_trace_comes_before_the_sentence(tmp_path, monkeypatch):
    def full(uri, data):
        raise storage.StorageError("No space left on device.")

    monkeypatch.setattr(storage, "write_bytes", full)
    err, last = _run(_raising(KeyError("x")), str(tmp_path))
    assert last == "Error: KeyError: 'x'"
    assert "in job_that_fails\n" in err
