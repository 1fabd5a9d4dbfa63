"""Benchmark cnnray against other tools and bare loops, on this machine or on the cluster that RAY_ADDRESS names."""

import argparse
import contextlib
import dataclasses
import tempfile
from pathlib import Path

from cnnray import commandline, flags
from cnnray.images import storage

_STUDIES = ("start", "formats", "recipes", "causes", "few-images", "small-networks")
MEASURES = ("pixels", "ingest", "train", "predict", "export", "serve", "scale", *_STUDIES, "all")
_WITH_OWN_IMAGES = ("start", "pixels", "export", "serve", "formats", "causes", "few-images", "small-networks")
"""Measurements that always use their own images."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "measure",
        nargs="?",
        default="all",
        choices=MEASURES,
        help="scale: increasing numbers of workers, and a projection; all: everything except "
        f"{', '.join(_STUDIES)}, which take ten minutes to eight hours each; recipes, causes and few-images go on "
        "with the results in --folder",
    )
    parser.add_argument(
        "--data",
        help="your own images, in the forms that the jobs accept (recipes: with labels); default: generated photos",
    )
    parser.add_argument("--images", type=int, help="number of images; default: each measurement's own number")
    parser.add_argument(
        "--folder", help="keep photos, bundles and the peers' environment here; with several nodes, a shared folder"
    )
    arguments = parser.parse_args()
    try:
        flags.check_at_least_one(arguments, "images")
        for flag, ignored_by in (("data", _WITH_OWN_IMAGES), ("images", (*_WITH_OWN_IMAGES, "recipes"))):
            if vars(arguments)[flag] is not None and arguments.measure in ignored_by:
                raise ValueError(f"--{flag} has no effect on {arguments.measure}; leave it out.")
        data = flags.absolute("data", arguments.data) if arguments.data else None
        permanent = Path(flags.absolute("folder", arguments.folder)) if arguments.folder else None
        if permanent and not storage.is_local(arguments.folder):
            raise ValueError("--folder must be a local path, because the peers cannot read buckets.")
    except (ValueError, OSError) as error:
        parser.error(str(error))

    def job() -> dict[str, object]:
        from benchmarks import report
        from benchmarks.run import run

        with contextlib.ExitStack() as stack:
            folder = permanent or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            result = run(arguments.measure, folder, data, arguments.images, shared=bool(permanent))
        print("\n\n".join([*result.tables, report.describe_machine(), result.cluster]))
        results = {name: value for name, value in dataclasses.asdict(result).items() if name != "tables"}
        return results | {"machine": report.describe_machine()}

    commandline.run(job)


if __name__ == "__main__":
    main()
