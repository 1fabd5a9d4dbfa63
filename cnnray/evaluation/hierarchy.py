"""Classes with a structure: the groups that `--hierarchy` names, and how well they are told apart."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from cnnray.evaluation import metrics
from cnnray.evaluation.comparison import EvaluationError
from cnnray.evaluation.metrics import Predictions
from cnnray.images import storage
from cnnray.models.groups import Groups

_COLUMNS = ["class", "group"]


def read(uri: str, class_names: Sequence[str]) -> dict[str, str]:
    """Read the group of each class: a CSV table with the columns class and group, or YAML or JSON, `class: group`.

    Returns:
        By class, in the order of `class_names`, the name of its group.

    Raises:
        EvaluationError: it is something else, or has not each class of the bundle once, and no other.
        OSError: it cannot be read.
    """
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise EvaluationError(f"--hierarchy {uri} is not UTF-8 text.") from None
    pairs = _read_csv(uri, text) if uri.lower().endswith(".csv") else _read_yaml(uri, text)
    groups = dict(pairs)
    if len(groups) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise EvaluationError(f"--hierarchy {uri} names the class {twice!r} twice.")
    if unknown := sorted(set(groups) - set(class_names)):
        raise EvaluationError(f"--hierarchy {uri} names {unknown[0]!r}, which is not a class of the bundle.")
    if missing := [name for name in class_names if not groups.get(name)]:
        raise EvaluationError(f"--hierarchy {uri} gives no group for the class {missing[0]!r}.")
    return {name: groups[name] for name in class_names}


def _read_csv(uri: str, text: str) -> list[tuple[str, str]]:
    rows = csv.DictReader(io.StringIO(text))
    if not set(_COLUMNS) <= set(rows.fieldnames or []):
        raise EvaluationError(f"--hierarchy {uri} lacks the columns class and group.")
    return [(row["class"] or "", row["group"] or "") for row in rows]


def _read_yaml(uri: str, text: str) -> list[tuple[str, str]]:
    try:
        # As nodes, in which a class may come twice, and 1 and no are texts.
        content = yaml.compose(text, yaml.BaseLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise EvaluationError(f"--hierarchy {uri} is neither YAML nor JSON: {reason}.") from None
    pairs = content.value if isinstance(content, yaml.MappingNode) else []
    if not pairs or not all(isinstance(node, yaml.ScalarNode) for pair in pairs for node in pair):
        raise EvaluationError(f"--hierarchy {uri} is not a table of classes and their groups, such as `cat: animal`.")
    return [(name.value, group.value) for name, group in pairs]


def measure(predictions: Predictions, groups: Mapping[str, str]) -> dict[str, Any]:
    """How well groups are told apart.

    Args:
        predictions: of classes.
        groups: by class, the name of its group.

    Returns:
        `group_accuracy`: the share of the images whose most probable group, by the sum over its classes, is that of
        their class; `group_interval`: its Wilson interval of 95 %; `groups`: by group its `name`, the number of its
        `classes` and of its `images`; of these, `class_accuracy` and `recall`, the shares whose class and whose group
        are right; and `precision`, of the images with this most probable group.
    """
    known = Groups.of(groups, predictions.class_names)
    of_classes = np.asarray(known.of_classes)
    truth = of_classes[predictions.targets]
    predicted = (predictions.probabilities @ known.membership.astype(np.float64)).argmax(1)
    right = predicted == truth
    rows = []
    for index, name in enumerate(known.names):
        inside, given = truth == index, predicted == index
        rows.append(
            {
                "name": name,
                "classes": int((of_classes == index).sum()),
                "images": int(inside.sum()),
                "class_accuracy": _mean(predictions.correct[inside]),
                "recall": _mean(right[inside]),
                "precision": _mean(right[given]),
            }
        )
    interval = metrics.wilson_interval(int(right.sum()), len(right))
    return {"group_accuracy": float(right.mean()), "group_interval": interval, "groups": rows}


def _mean(values: Any) -> float | None:
    return float(values.mean()) if len(values) else None
