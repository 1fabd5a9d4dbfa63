"""The config of a search: every field is a flag of jobs/tune.py and a key of its YAML."""

import ast
import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import yaml

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.models.augment import Augmentations
from cnnray.training.config import TrainConfig

SPACES = ("uniform", "quniform", "loguniform", "qloguniform", "randint", "lograndint", "choice", "grid_search")
"""The search spaces of Ray Tune that `--search` takes."""

LISTS = ("choice", "grid_search")
"""Those of the spaces whose only argument is a list of values."""

Space = dict[str, list[Any]]
"""The name of a space and its arguments, such as {"loguniform": [1e-4, 1e-2]}; of `LISTS` the values, such as
{"choice": ["none", "light"]}."""


Metric = Literal["val_accuracy", "val_mean_average_precision", "val_loss"]


@configs.group(searchable=False)
@dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """Search for the best values of training flags, and leave them as YAML that jobs/train.py --config takes.

    All other flags are those of jobs/train.py, the same for each trial.
    """

    RENAMED: ClassVar[configs.Renamed] = {
        **TrainConfig.RENAMED,
        "search": lambda spaces: {"search": _spaces(spaces)},
    }

    search: dict[str, Space] | list[str] = field(default_factory=list)
    """The flags that are searched, each with a search space of Ray Tune and its arguments, such as
    '{learning_rate: {loguniform: [1e-4, 1e-2]}, augment: {choice: [none, light]}}'; the spaces are uniform, quniform,
    loguniform, qloguniform, randint, lograndint, choice, grid_search. Strings of the form FLAG=SPACE(ARGUMENTS), as
    earlier versions took them, are read as well."""
    trials: int = 10
    """Values that are tried (of grid_search: as often each)."""
    parallel: int = field(default=1, metadata=rules(resumable=True))
    """Trials that run side by side, each on its share of the cluster."""
    metric: Metric | None = None
    """The metric of a trial's best epoch by which the best trial is chosen; null: val_accuracy, or with several
    labels val_mean_average_precision."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        super().__post_init__()
        flags.check_at_least_one(self, "trials", "parallel")
        if self.is_elastic:
            raise ValueError("--min-workers: the trials of a search have a fixed number of workers (--max-workers).")
        for name in ("preview_augmentations", "sanity", "find_learning_rate"):
            if getattr(self, name):
                raise ValueError(f"{flags.flag_name(name)} is a flag of jobs/train.py.")
        if self.mlflow_model is not None:
            raise ValueError("--mlflow-model is a flag of jobs/train.py: a search registers no bundle.")
        if not self.search:
            raise ValueError("--search is needed, such as --search '{learning_rate: {loguniform: [1e-4, 1e-2]}}'.")
        object.__setattr__(self, "search", _spaces(self.search))
        if self.parallel > 1 and "max_workers" in self.search and self.cpus_per_worker is None:
            raise ValueError("--search max_workers with --parallel: give --cpus-per-worker, too.")

    def trial(self, values: dict[str, Any], output: str) -> TrainConfig:
        """The training run that a trial is.

        Args:
            values: by flag, with dots for those inside others.
            output: of the run.

        Raises:
            ValueError: values that cannot work.
        """
        shared = configs.fields_of(self, TrainConfig)
        for name, value in values.items():
            outer, _, inner = name.partition(".")
            shared[outer] = dataclasses.replace(shared[outer], **{inner: value}) if inner else value
        # Flags of the whole search, such as its tracker, are not those of its trials.
        own = configs.names(TrainConfig, searchable=False)
        return TrainConfig(**{name: value for name, value in shared.items() if name not in own}, output=output)


def _spaces(given: dict[str, Space] | list[str]) -> dict[str, Space]:
    """The search spaces by field.

    Raises:
        ValueError: an unknown flag or space, a flag that is given twice, or another form, in one sentence.
    """
    pairs = [pair for text in given for pair in _parsed(text)] if isinstance(given, list) else list(given.items())
    spaces: dict[str, Space] = {}
    for flag, space in pairs:
        name = flag.strip().removeprefix("--").replace("-", "_")
        _check_flag(flag, name)
        if not (isinstance(space, dict) and len(space) == 1 and isinstance(next(iter(space.values())), list)):
            raise ValueError(f"--search {flag}: expected a space and its arguments, such as {{uniform: [0, 0.5]}}.")
        if (kind := next(iter(space))) not in SPACES:
            raise ValueError(f"--search {flag}: no space is called {kind!r}; there are {', '.join(SPACES)}.")
        if name in spaces:
            raise ValueError(f"--search has {name} twice.")
        spaces[name] = space
    return spaces


def _check_flag(flag: str, name: str) -> None:
    known = configs.names(TrainConfig, searchable=True)
    outer, _, inner = name.partition(".")
    nested = {item.name for item in dataclasses.fields(Augmentations)} if outer == "augmentations" else {""}
    if outer not in known or inner not in nested:
        raise ValueError(f"--search {flag}: {name!r} is no training flag that can be searched.")


def _parsed(text: str) -> list[tuple[str, Any]]:
    """Flags and their spaces from a YAML mapping, or from FLAG=SPACE(ARGUMENTS).

    Raises:
        ValueError: another form, in one sentence.
    """
    try:
        if isinstance(mapping := configs.read_yaml(text), dict):
            return list(mapping.items())
    except yaml.YAMLError:
        pass
    name, _, space = text.partition("=")
    try:
        call = ast.parse(space.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords):
            raise ValueError("not a call")
        values = [ast.literal_eval(value) for value in call.args]
        return [(name, {call.func.id: values[0] if call.func.id in LISTS and len(values) == 1 else values})]
    except (ValueError, SyntaxError):
        raise ValueError(
            f"--search {text}: expected a space for each flag, such as '{{dropout: {{uniform: [0, 0.5]}}}}'."
        ) from None
