"""Compares two evaluations of the same images, and decides whether accuracy fell: the gate of `--compare`."""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnnray.errors import PermanentError
from cnnray.evaluation import paired
from cnnray.images import storage

log = logging.getLogger(__name__)

ROWS = "predictions.parquet"
MIN_IMAGES = 30
"""Images below which accuracies are not compared: the interval of their difference is an approximation."""
PASSED, FAILED, UNDECIDED, REFUSED = "passed", "failed", "undecided", "refused"
_ASKED = ("wanted_accuracy", "certainty")
"""Floats of `metrics.json` that are not figures."""
_COLUMNS = pa.schema({name: pa.string() for name in ("uri", "label", "prediction", "error")})
_FACTORS = (2, 3, 5, 10, 20, 50, 100, 1000)
"""Multiples of the number of images, for the advice on how many would decide."""


class EvaluationError(PermanentError, RuntimeError):
    """An evaluation that failed, or an accuracy that fell too far; the message is one sentence for the user."""


class UndecidedError(EvaluationError):
    """A comparison with too few images to say whether accuracy fell too far."""

    exit_code = 3


@dataclass(frozen=True)
class OtherEvaluation:
    """An earlier evaluation to compare with."""

    uri: str
    """Uri of its metrics.json."""
    results: dict[str, Any]
    """Content of its metrics.json."""
    rows: pa.Table
    """One row for each image, with `uri`, `label`, `prediction` and `error`."""


def read_evaluation(uri: str) -> OtherEvaluation:
    """Read an earlier evaluation.

    Args:
        uri: uri of its metrics.json; its predictions.parquet lies in the same folder.

    Raises:
        EvaluationError: it cannot be read.
    """
    try:
        results = json.loads(storage.read_bytes(uri))
        _ = results["model"], _class_names(results)  # are used later
        data = storage.read_bytes(storage.join(uri.rpartition("/")[0], ROWS))
        rows = storage.parse_parquet(data).select(_COLUMNS.names).cast(_COLUMNS)
        return OtherEvaluation(uri, results, rows)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise EvaluationError(f"--compare {uri} is no metrics.json of an evaluation: {error}.") from None


def check_comparable(
    other: OtherEvaluation, manifest: pa.Table, class_names: Collection[str], max_error_fraction: float
) -> None:
    """Check, before anything is classified, that this evaluation can be compared with the other one.

    Args:
        other: the evaluation to compare with.
        manifest: the images of this evaluation, with `uri` and `label`.
        class_names: the classes of the bundle.
        max_error_fraction: largest share of images without a prediction.

    Raises:
        EvaluationError: the evaluations are of other images, labels or classes, or the other one has too many errors.
    """
    here, there = (table["uri"].cast(pa.string()).combine_chunks() for table in (manifest, other.rows))
    places = pc.index_in(there, here)
    only_here, only_there = here.filter(pc.invert(pc.is_in(here, there))), there.filter(pc.is_null(places))
    if len(only_here) or len(only_there) or len(here) != len(there):
        example = pa.chunked_array([only_there, only_here, there])[0]
        raise EvaluationError(
            f"--compare {other.uri} is of other images: {len(only_here)} of {len(here)} are only in this evaluation, "
            f"{len(only_there)} of {len(there)} only in that one, for example {example}. Evaluate both networks with "
            "the same --data and --split."
        )
    labels = manifest["label"].cast(pa.string()).combine_chunks().take(places)
    differ = pc.not_equal(labels, other.rows["label"].combine_chunks())
    if count := pc.sum(differ).as_py():
        first = pc.index(differ, True).as_py()
        raise EvaluationError(
            f"--compare {other.uri} has other labels for {count} of {len(here)} images, for example {there[first]}: "
            f"{labels[first].as_py()!r} here, {other.rows['label'][first].as_py()!r} there."
        )
    other_names = _class_names(other.results)
    if different := sorted(set(class_names) ^ other_names):
        where = "that one" if different[0] in other_names else "this one"
        raise EvaluationError(
            f"--compare {other.uri} is of a network with other classes: only {where} has {different[0]!r}."
        )
    if problem := _too_many_errors(other.rows, max_error_fraction):
        raise EvaluationError(f"--compare {other.uri} cannot be compared with: there {problem}.")


def compare(
    rows: pa.Table, results: dict[str, Any], other: OtherEvaluation, max_drop: float, max_error_fraction: float
) -> dict[str, Any]:
    """Compare the accuracies of two evaluations, and decide whether this one is too much worse.

    An image without a prediction in the other evaluation is left out. An image that has one only there counts as
    wrong here: a network that fails on difficult images must not become better by it. The loss of accuracy is that of
    the other evaluation minus this one; its interval is Tango's (`paired.difference_interval`).

    Args:
        rows: the rows of this evaluation, with `uri`, `label`, `prediction` and `error`.
        results: content of this evaluation's metrics.json.
        other: the evaluation to compare with; `check_comparable` has passed.
        max_drop: accepted loss of accuracy.
        max_error_fraction: largest share of images without a prediction.

    Returns:
        The section `comparison` of `metrics.json`. About the other evaluation: `other` (uri) and its `model`. Numbers
        of images: `images` that are compared, `only_this_has` and `only_other_has` with a prediction in one only.
        About the images that are compared: `accuracy`, `other_accuracy`, `drop` (None without any), `drop_interval`
        (the bounds of its 95 % confidence interval) and `mcnemar` (see `paired`). By name the `figures` of both, each
        on all of its own images. The `decision`, and the `sentence` that explains it:

        - `passed`: the whole interval is at most `max_drop`. A network whose true loss is `max_drop` or more passes
          with a probability of 0.032 at most (exact, for 30 to 3,000 images).
        - `failed`: the whole interval is more than `max_drop`. A network whose true loss is `max_drop` or less fails
          with a probability of 0.053 at most.
        - `undecided`: `max_drop` lies inside the interval, or there are less than `MIN_IMAGES` images.
        - `refused`: too many images have no prediction here.
    """
    rows = rows.select(_COLUMNS.names).cast(_COLUMNS)
    other_good = other.rows.filter(pc.is_null(other.rows["error"]))
    here = rows.take(pc.index_in(other_good["uri"], rows["uri"].combine_chunks()))
    this = pc.fill_null(pc.equal(here["prediction"], here["label"]), False).to_numpy()
    that = pc.equal(other_good["prediction"], other_good["label"]).to_numpy()
    count, in_both, mcnemar = len(that), len(here) - here["prediction"].null_count, paired.mcnemar(this, that)
    names = [
        name
        for name, value in results.items()
        if isinstance(value, float) and isinstance(other.results.get(name), float) and name not in _ASKED
    ]
    comparison = {
        "other": other.uri,
        "model": other.results["model"],
        "images": count,
        "only_this_has": rows["error"].null_count - in_both,
        "only_other_has": count - in_both,
        "accuracy": float(this.mean()) if count else None,
        "other_accuracy": float(that.mean()) if count else None,
        "drop": float(that.mean() - this.mean()) if count else None,
        "drop_interval": (
            list(paired.difference_interval(mcnemar["only_other"], mcnemar["only_this"], count)) if count else None
        ),
        "mcnemar": mcnemar,
        "figures": {name: [results[name], other.results[name]] for name in names},
    }
    if problem := _too_many_errors(rows, max_error_fraction):
        decision, sentence = REFUSED, f"Not compared with {other.uri}: {problem}."
    else:
        decision, sentence = decide(comparison, max_drop)
    return comparison | {"decision": decision, "sentence": sentence}


def decide(comparison: dict[str, Any], max_drop: float) -> tuple[str, str]:
    """The decision, as in `compare`, and the sentence that explains it."""
    count, uri = comparison["images"], comparison["other"]
    if count < MIN_IMAGES:
        return UNDECIDED, f"Undecided: at least {MIN_IMAGES} images are needed to compare with {uri}, not {count}."
    low, high = comparison["drop_interval"]
    loss = (
        f"the accuracy on {count} images is {comparison['accuracy']:.4f}, and {comparison['other_accuracy']:.4f} in "
        f"{uri}: a loss of {comparison['drop']:.4f} (95 % confidence interval {low:.4f} to {high:.4f})"
    )
    if high <= max_drop:
        return PASSED, f"Passed: {loss}, not more than --max-drop {max_drop:g}."
    if low > max_drop:
        return FAILED, f"Failed: {loss}, more than --max-drop {max_drop:g}."
    advice = _advice(comparison, max_drop)
    return UNDECIDED, f"Undecided: {loss}, which may be more than --max-drop {max_drop:g} or not; {advice}."


def _advice(comparison: dict[str, Any], max_drop: float) -> str:
    """What would decide, if more images are like these."""
    only_other, only_this = comparison["mcnemar"]["only_other"], comparison["mcnemar"]["only_this"]
    for factor in _FACTORS:
        low, high = paired.difference_interval(factor * only_other, factor * only_this, factor * comparison["images"])
        if high <= max_drop or low > max_drop:
            return f"evaluate both on about {factor} times as many images, or give another --max-drop"
    return "the loss is too near to it: give another --max-drop"


def check(comparison: dict[str, Any]) -> None:
    """Log the decision of `compare`.

    Raises:
        UndecidedError: there are too few images to decide.
        EvaluationError: this evaluation is too much worse, or was not compared.
    """
    decision, sentence = comparison["decision"], comparison["sentence"]
    if decision == UNDECIDED:
        raise UndecidedError(sentence)
    if decision != PASSED:
        raise EvaluationError(sentence)
    log.info("%s", sentence)


def _class_names(results: dict[str, Any]) -> set[str]:
    return {row["name"] for row in results["classes"]}


def _too_many_errors(rows: pa.Table, limit: float) -> str:
    """The end of a sentence if more than this share of the rows has no prediction; else empty."""
    bad = rows.filter(pc.is_valid(rows["error"]))
    if len(bad) <= limit * len(rows):
        return ""
    return (
        f"{len(bad)} of {len(rows)} images have no prediction, more than --max-error-fraction {limit:g}, for example "
        f"{bad['uri'][0]} ({bad['error'][0]}); solve that, and run that evaluation again with --retry-errors"
    )
