"""Search for the best training flags: python jobs/tune.py --data DIR --output DIR --search '{FLAG: {SPACE: [..]}}'"""

from typing import Any

from cnnray import commandline
from cnnray.tuning.config import SearchConfig


def run(config: SearchConfig) -> dict[str, Any]:
    from cnnray.tuning.job import search

    return search(config)


if __name__ == "__main__":
    commandline.main(SearchConfig, "jobs/tune.py", run)
