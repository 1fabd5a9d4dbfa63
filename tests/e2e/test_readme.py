"""Runs the README's commands as written, and checks its list of files and all documented flags and targets."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, write_digits

README = (REPOSITORY / "README.md").read_text()
DOCUMENTS = README + "".join(path.read_text() for path in sorted((REPOSITORY / "docs").glob("*.md")))


def _marked_blocks():
    return re.findall(r"<!-- run -->\n```(\w+)\n(.*?)```", README, re.DOTALL)


@pytest.mark.timeout(900)
def test_marked_blocks_run(tmp_path):
    """Run the blocks in a folder with the images of `make demo`, those of Python on a Ray of their own.

    `ray.init()` without an address connects to the cluster that `ray start` started last on this machine, also if it
    has ended.
    """
    blocks = _marked_blocks()
    assert [language for language, _ in blocks] == ["sh", "python", "sh", "sh", "python", "sh", "python"]
    write_digits(tmp_path / "demo" / "digits", 1797)
    shutil.copytree(REPOSITORY / "jobs", tmp_path / "jobs")
    printed = []
    for language, text in blocks:
        text = text.replace(".venv/bin/python", sys.executable)
        command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
        completed = subprocess.run(
            [*command, text], cwd=tmp_path, env=os.environ | ({} if language == "sh" else {"RAY_ADDRESS": "local"}),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert completed.returncode == 0, completed.stderr
        printed.append(completed.stdout.splitlines())
    trained, answers, evaluated, exported, answers_of_int8, predicted, counted = printed
    assert json.loads(trained[-1])["epochs"] == 14
    assert answers[0].startswith("Prediction(label=")
    assert answers[-1].startswith("not an image")
    assert json.loads(evaluated[-1])["accuracy"] == pytest.approx(
        json.loads(trained[-1])["metrics"]["val_accuracy"], abs=0.003
    )
    assert len(json.loads(exported[-1])["formats"]) == 6
    assert answers_of_int8[0].startswith("[Prediction(label=")
    summary = json.loads(predicted[-1])
    assert (summary["rows"], summary["errors"]) == (1797, 0)
    assert summary["engine"] not in ("auto", "keras")
    assert counted[-1] == "1797"


def test_make_targets_and_flags_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", DOCUMENTS, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    help_text = "".join(
        subprocess.run(
            [sys.executable, f"jobs/{job}.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout
        for job in ("train", "tune", "evaluate", "export", "predict", "serve", "benchmark")
    )
    # Without the flags of other programs, except what follows the -- of `ray job submit`.
    others = r"(?m)(?:^ *|`)(?:\S*/)?(?:aws|docker|kubectl|npm|prometheus|ray|serve|uv) [^`\n]*?(?: -- |`|$)"
    in_lines = re.sub(r"\\\n\s*", "", DOCUMENTS)
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(others, "", in_lines))) - {"--working-dir"}
    assert {"--data", "--gpus-per-worker", "--bundle"} <= flags
    for flag in flags:
        assert flag in help_text, flag


def test_the_tree_is_complete():
    tree = README.partition("## The tree")[2]
    named = set(re.findall(r"^\s+(\w+\.(?:py|html))\s", tree, re.MULTILINE))
    listed = subprocess.run(
        ["git", "ls-files", "cnnray", "jobs"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
    files = {path.rpartition("/")[2] for path in listed}
    assert files - {"__init__.py"} == named
