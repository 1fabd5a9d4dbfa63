"""Search for the best training flags: python jobs/tune.py --data DIR --output DIR --search 'flag=space(values)'"""

from cnnray import commandline
from cnnray.tuning.config import SearchConfig


def main() -> None:
    config = commandline.parse(SearchConfig, "jobs/tune.py")

    def job() -> dict[str, object]:
        from cnnray.tuning.job import search

        return search(config)

    commandline.run(job)


if __name__ == "__main__":
    main()
