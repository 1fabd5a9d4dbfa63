"""Rules that hold for all files of the repository."""

import re
import subprocess
import sys
import tomllib

from tests.conftest import REPOSITORY


def test_imports_point_down_only():
    # In a process of its own, because the linter silences all loggers.
    program = "from importlinter import cli; raise SystemExit(cli.lint_imports(is_debug_mode=False))"
    linted = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def _tracked(*patterns):
    listed = subprocess.run(
        ["git", "ls-files", "--", *patterns], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return [REPOSITORY / name for name in listed.stdout.split()]


def test_no_path_edits_and_no_index_addresses():
    for path in _tracked("*.py"):
        if path.name != "test_house.py":
            assert "sys.path" not in path.read_text(), path
    for path in _tracked("requirements*.lock", "pyproject.toml", "Makefile"):
        assert "index-url" not in path.read_text(), path
        assert "https://" not in path.read_text() or path.name == "Makefile", path


def test_importing_does_no_work(tmp_path):
    """Every module can be imported without a network, a file written, logging configured or Ray started."""
    modules = [
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
        for path in _tracked("cnnray/*.py")
    ]
    program = (
        "import importlib, logging, os, socket\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import ray\n"
        "assert not ray.is_initialized()\n"
        "assert not logging.getLogger('cnnray').handlers and not logging.getLogger('cnnray').level\n"
        "assert not os.listdir('.')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=120)


def test_the_command_line_needs_neither_ray_nor_tensorflow():
    program = (
        "import sys\nimport cnnray.commandline, cnnray.training.config, cnnray.prediction.config\n"
        "loaded = {'ray', 'tensorflow', 'keras'} & set(sys.modules)\nassert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_design_page_states_the_layers_that_the_linter_checks():
    page = (REPOSITORY / "docs/design.md").read_text()
    layers = re.search(r"linter's configuration:\n\n```\n(.*?)```", page, re.DOTALL)[1].splitlines()
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert layers == next(contract["layers"] for contract in contracts if contract["type"] == "layers")
