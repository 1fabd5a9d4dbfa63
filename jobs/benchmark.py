"""Measure against peers and bare limits, side by side, on this machine or on the cluster that RAY_ADDRESS names."""

import argparse
import contextlib
import dataclasses
import tempfile
from pathlib import Path

from cnnray import commandline, flags
from cnnray.images import storage

MEASURES = ("ingest", "train", "predict", "export", "serve", "scale", "formats", "recipes", "all")
_OF_THEIR_OWN = ("export", "serve", "formats")
"""That bring their images."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "measure",
        nargs="?",
        default="all",
        choices=MEASURES,
        help="scale: more and more workers, and a projection; all leaves out formats and recipes, which take long",
    )
    parser.add_argument("--data", help="your own images, as the jobs take them (for recipes with labels); else made")
    parser.add_argument("--images", type=int, help="how many, instead of each measurement's own number")
    parser.add_argument(
        "--folder", help="where photos, bundles and the peers' environment are kept; on several nodes a shared one"
    )
    given = parser.parse_args()
    try:
        flags.check_at_least_one(given, "images")
        for flag, others in (("data", _OF_THEIR_OWN), ("images", (*_OF_THEIR_OWN, "recipes"))):
            if vars(given)[flag] is not None and given.measure in others:
                raise ValueError(f"--{flag} means nothing to {given.measure}.")
        data = flags.absolute("data", given.data) if given.data else None
        kept = Path(flags.absolute("folder", given.folder)) if given.folder else None
        if kept and not storage.is_local(given.folder):
            raise ValueError("--folder must be a path, as the peers read no buckets.")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def job() -> dict[str, object]:
        from benchmarks import report
        from benchmarks.run import run

        with contextlib.ExitStack() as stack:
            folder = kept or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            result = run(given.measure, folder, data, given.images, shared=bool(kept))
        print("\n\n".join([*result.tables, report.machine(), result.cluster]))
        figures = {name: value for name, value in dataclasses.asdict(result).items() if name != "tables"}
        return figures | {"machine": report.machine()}

    commandline.run(job)


if __name__ == "__main__":
    main()
