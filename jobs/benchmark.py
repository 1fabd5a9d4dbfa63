"""Measure against peers and bare limits, side by side on this machine: make bench"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from cnnray import cluster, commandline

MEASURES = ("ingest", "train", "predict", "export", "serve", "formats", "recipes", "all")


def main() -> None:
    parser = argparse.ArgumentParser(prog="jobs/benchmark.py", description=__doc__)
    parser.add_argument(
        "measure",
        nargs="?",
        default="all",
        choices=MEASURES,
        help="all leaves out formats and recipes, which take long",
    )
    parser.add_argument("--data", help="recipes: your own labelled images, as training takes them")
    given = parser.parse_args()
    measure = given.measure
    if given.data and measure != "recipes":
        parser.error("--data is for recipes")

    def job() -> dict[str, object]:
        from cnnray.benchmarks import export, ingest, load, predict, recipes, report, serve, train
        from cnnray.images import stream

        if measure in ("serve", "all"):
            load.require_wrk()
        comparisons, tables = [], []
        with tempfile.TemporaryDirectory() as folder:
            if measure not in ("export", "formats", "recipes", "serve"):
                with cluster.connected() as found:
                    stream.be_quiet()
                    if measure in ("ingest", "all"):
                        comparisons += ingest.ingest(Path(folder), found)
                    if measure in ("train", "all"):
                        comparisons += train.train(Path(folder), found)
                    if measure in ("predict", "all"):
                        comparisons += predict.predict(Path(folder), found)
            if measure in ("export", "all"):
                comparisons += export.export(Path(folder))
            if measure == "formats":
                tables.append(export.formats(Path(folder)))
            if measure == "recipes":
                tables.append(recipes.recipes(Path(folder), given.data))
            if measure in ("serve", "all"):
                of_services, latencies = serve.serve(Path(folder))
                comparisons += of_services
                tables.append(latencies)
        if comparisons:
            tables.append(report.table(comparisons))
        print("\n\n".join([*tables, report.machine()]))
        return {"comparisons": [dataclasses.asdict(one) for one in comparisons], "machine": report.machine()}

    commandline.run(job)


if __name__ == "__main__":
    main()
