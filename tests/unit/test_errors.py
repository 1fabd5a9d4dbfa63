"""Errors that a user gets as one sentence: their kinds, pickling, and what a job prints."""

import importlib
import json
import pickle
import pkgutil

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
    """Undo the signal handler and the two variables that `commandline.run` sets."""
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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ManifestError("No images."), 1), (storage.NotFoundError("x does not exist."), 1),
        (OSError("No space left."), 1), (UndecidedError("Undecided."), 3),
    ],
)  # fmt: skip
def test_a_job_prints_one_sentence(error, code, capsys):
    def job():
        raise error

    with pytest.raises(SystemExit) as stopped:
        commandline.run(job)
    assert stopped.value.code == code
    assert capsys.readouterr() == ("", f"Error: {error}\n")


@pytest.mark.parametrize("error", [ValueError, RuntimeError, KeyError, NotImplementedError, json.JSONDecodeError])
def test_faults_of_the_program_keep_their_traceback(error):
    def job():
        raise error(*(("not JSON", "x", 0) if error is json.JSONDecodeError else ("x",)))

    with pytest.raises(error):
        commandline.run(job)
