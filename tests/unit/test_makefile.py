"""make install finds a Python that can run cnnray."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TOOLS = ("make", "sh", "sed", "touch", "mkdir")


@pytest.fixture
def install(tmp_path):
    """Runs `make install` where the PATH has only Pythons that claim to be of some versions, and install nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    project = tmp_path / "project"
    project.mkdir()
    (project / "native").mkdir()
    for name in ("Makefile", "requirements.lock", "requirements-dev.lock", "pyproject.toml", "native/resize.c"):
        shutil.copy(REPOSITORY / name, project / name)

    def run(pythons, *arguments, keep=False):
        """
        Args:
            pythons: what each Python does, by name: its version, or `no venv`.
            arguments: of make.
            keep: whether .venv is kept from the run before.

        Returns:
            The finished process, and the Python that made .venv.
        """
        for path in programs.glob("python*"):
            path.unlink()
        if not keep:
            shutil.rmtree(project / ".venv", ignore_errors=True)
        for name, version in pythons.items():
            _write_python(programs / name, version, tmp_path / "made")
        (tmp_path / "made").unlink(missing_ok=True)
        (project / ".venv" / "installed").unlink(missing_ok=True)
        command = ["make", "install", *arguments]
        process = subprocess.run(command, cwd=project, env={"PATH": str(programs)}, capture_output=True, text=True)
        return process, (tmp_path / "made").read_text() if (tmp_path / "made").exists() else None

    return run


def _write_python(path, version, made):
    """A program that answers as a Python of this version, and whose environments have a pip that does nothing."""
    numbers = tuple(map(int, version.split("."))) if version != "no venv" else None
    path.write_text(
        f"#!{sys.executable}\n"
        "import os, pathlib, shutil, sys\n"
        "if sys.argv[1] == '-c':\n"
        f"    numbers = {numbers}\n"
        "    if numbers is None: sys.exit(1)\n"
        "    sys.version_info = numbers\n"
        "    exec(sys.argv[2])\n"
        "else:\n"
        "    folder = pathlib.Path(sys.argv[-1], 'bin')\n"
        "    folder.mkdir(parents=True, exist_ok=True)\n"
        "    shutil.copy(__file__, folder / 'python')\n"
        "    for name in ('pip', 'uv'):\n"
        "        (folder / name).write_text('#!/bin/sh\\n')\n"
        "        (folder / name).chmod(0o755)\n"
        f"    pathlib.Path({str(made)!r}).write_text(os.path.basename(__file__))\n"
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("pythons", "taken"),
    [
        ({"python3.11": "3.11"}, "python3.11"),
        ({"python3.12": "3.12"}, "python3.12"),
        ({"python3.11": "3.11", "python3.12": "3.12", "python3.13": "3.13"}, "python3.13"),
        ({"python3.12": "3.12", "python3.13": "no venv"}, "python3.12"),
        ({"python3.10": "3.10", "python3": "3.12"}, "python3"),
    ],
)
def test_the_newest_supported_python_is_taken(pythons, taken, install):
    process, made = install(pythons)
    assert process.returncode == 0, process.stderr
    assert made == taken


@pytest.mark.parametrize("pythons", [{}, {"python3": "3.10", "python3.14": "3.14"}, {"python3.13": "no venv"}])
def test_without_one_there_is_one_sentence(pythons, install):
    process, made = install(pythons)
    assert process.returncode != 0
    assert made is None
    sentence, *rest = process.stderr.splitlines()
    assert sentence.startswith("cnnray needs Python 3.11 to 3.13 with its module venv")
    assert len(rest) == 1  # make's own, which names the target


def test_a_python_can_be_named(install):
    pythons = {"python3.13": "3.13", "python3.11": "3.11"}
    assert install(pythons, "PYTHON=python3.11")[1] == "python3.11"
    # A later lock file is installed into the same environment.
    assert install(pythons, keep=True)[1] is None
    assert "needs Python 3.11 to 3.13" in install(pythons, "PYTHON=/no/python")[0].stderr


def test_the_makefile_states_the_versions_of_the_package():
    supported = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    (low, high) = re.findall(r"3\.(\d+)", supported)
    makefile = (REPOSITORY / "Makefile").read_text()
    assert f"(3, {low}) <= sys.version_info < (3, {high})" in makefile
    assert f"Python 3.{low} to 3.{int(high) - 1}" in makefile
    assert [f"python3.{minor}" for minor in range(int(high) - 1, int(low) - 1, -1)] == re.findall(
        r"python3\.\d+", re.search(r"PYTHON \?= (.*)", makefile)[1]
    )


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_uv_takes_the_lock_files(lock, tmp_path):
    """Where it refuses them, pip installs in its place, and takes twice as long."""
    python = Path(sys.executable)
    command = [python.with_name("uv"), "pip", "install", "--python", python]
    command += [
        "--offline",
        "--dry-run",
        "--require-hashes",
        "--requirement",
        lock,
        "--target",
        tmp_path / "packages",
    ]
    process = subprocess.run([*command, "--cache-dir", tmp_path], cwd=REPOSITORY, capture_output=True, text=True)
    assert "Packages were unavailable because the network was disabled" in process.stderr, process.stderr
