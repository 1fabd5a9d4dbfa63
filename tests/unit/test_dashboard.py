"""deploy/grafana-dashboard.json: Grafana can import it, and every metric in it is exported by cnnray or Ray."""

import ast
import json
import re
from pathlib import Path

import pytest
import ray

from tests.conftest import REPOSITORY

DASHBOARD = json.loads((REPOSITORY / "deploy" / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def exported_names():
    """The Prometheus names of cnnray's metrics, each with its labels (without those that Ray adds)."""
    names = {}
    for path in [REPOSITORY / "cnnray/tracking/prometheus.py"]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)):
                continue
            kind = call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id
            if kind not in ("Counter", "Gauge", "Histogram"):
                continue
            labels = {label.value for word in call.keywords if word.arg == "tag_keys" for label in word.value.elts}
            suffixes = {"Counter": ["_total"], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}[kind]
            for suffix in suffixes:
                names[f"ray_{call.args[0].value}{suffix}"] = labels | ({"le"} if suffix == "_bucket" else set())
    return names


def test_grafana_can_import_it():
    assert (DASHBOARD["title"], DASHBOARD["uid"], DASHBOARD["schemaVersion"]) == ("cnnray", "cnnray", 38)
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__all", "__rate_interval"}
    assert used == variables.keys()
    for panel in PANELS:
        assert panel["title"]
        assert panel["targets"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)  # no panel over another
    assert max(x for x, _ in cells) == 23


@pytest.mark.parametrize("expression", [target["expr"] for panel in PANELS for target in panel["targets"]])
def test_each_metric_is_defined_by_cnnray_or_ray(expression, ray_files):
    exported = exported_names()
    names = re.findall(r"\bray_\w+", expression)
    assert names
    for name in names:
        if name.startswith("ray_cnnray_"):
            assert name in exported, name
        else:
            bare = name.removeprefix("ray_")
            quoted = [
                quote + text.encode() + quote
                for text in (bare, bare.removesuffix("_total"))
                for quote in (b'"', b"\0")
            ]
            assert any(label in text for text in ray_files for label in quoted), name
    if len(names) == len([name for name in names if name in exported]):
        allowed = set.union(*(exported[name] for name in names))
        labels = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', expression)
        labels += [label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")]
        assert set(labels) <= allowed, expression


def test_each_metric_of_cnnray_is_shown():
    shown = {
        name for panel in PANELS for target in panel["targets"] for name in re.findall(r"\bray_\w+", target["expr"])
    }
    suffix = re.compile("_(bucket|sum|count)$")
    assert {suffix.sub("", name) for name in exported_names()} <= {suffix.sub("", name) for name in shown}


@pytest.fixture(scope="module")
def ray_files():
    """The contents of the files that name Ray's own metrics: modules of its agent and of Serve, and the raylet."""
    home = Path(ray.__file__).parent
    modules = [*(home / "dashboard/modules/reporter").glob("*.py"), *(home / "serve/_private").rglob("*.py")]
    return [path.read_bytes() for path in (*modules, home / "core/src/ray/raylet/raylet")]
