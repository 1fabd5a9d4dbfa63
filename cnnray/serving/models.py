"""The bundles that a replica holds, by name and version."""

import logging
import random
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from cnnray.errors import BadInputError
from cnnray.models import engines, startup
from cnnray.models.bundle import Bundle
from cnnray.models.predictor import Predictor
from cnnray.serving.batching import Batcher
from cnnray.serving.settings import Settings

log = logging.getLogger(__name__)


class NoSuchModelError(BadInputError, LookupError):
    """A name or version that is not served; the message is one sentence for the client."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version of a model, loaded and warmed up."""

    name: str
    version: str
    """`Bundle.version`."""
    bundle: Bundle
    engine: str
    batcher: Batcher
    """Runs the engine on images of all requests together."""


class Models:
    """All that is served, and which share of the requests each version has."""

    def __init__(self, served: Iterable[tuple[Served, float]]) -> None:
        """
        Args:
            served: each with its share, older versions of a name before newer ones.
        """
        self._by_name: dict[str, list[tuple[Served, float]]] = {}
        for one, share in served:
            self._by_name.setdefault(one.name, []).append((one, share))

    @property
    def names(self) -> list[str]:
        """The first is the default."""
        return list(self._by_name)

    def versions(self, name: str) -> list[tuple[Served, float]]:
        """The versions of a model with their shares, older ones first.

        Raises:
            NoSuchModelError: it is not served.
        """
        if name not in self._by_name:
            raise NoSuchModelError(f"There is no model {name!r}; there are {', '.join(self.names)}.")
        return self._by_name[name]

    def choose(self, name: str | None = None, version: str | None = None) -> Served:
        """The version that answers a request: that which is asked for, or one by chance, by their shares.

        Raises:
            NoSuchModelError: it is not served.
        """
        name = self.names[0] if name is None else name
        versions = self.versions(name)
        if version is None:
            if len(versions) == 1:
                return versions[0][0]
            return random.choices([one for one, _ in versions], [share for _, share in versions])[0]
        for one, _ in versions:
            if one.version == version:
                return one
        there = ", ".join(one.version for one, _ in versions)
        raise NoSuchModelError(f"The model {name} has no version {version!r}; it has {there}.")


class Loader:
    """Loads bundles, beside those that are loaded."""

    def __init__(self, executor: Executor, *, threads: int, gpus: bool, observe: Callable[[int], None]) -> None:
        """
        Args:
            executor: in which engines run.
            threads: CPU threads of an engine.
            gpus: whether this process has a GPU.
            observe: is told the size of each batch.
        """
        self._executor, self._threads, self._gpus, self._observe = executor, threads, gpus, observe
        self._loaded: dict[tuple[str, ...], Served] = {}

    def __call__(self, settings: Settings) -> Models:
        """All that the settings name; what was loaded for the settings before is used again where it is the same.

        Raises:
            BundleError, OSError: a bundle that cannot be loaded; what was loaded before is as it was.
        """
        loaded: dict[tuple[str, ...], Served] = {}
        found = []
        for model in settings.models:
            bundle, engine = Bundle.load(model.uri), settings.engine
            if engine == "auto":
                engine = engines.choose(bundle, gpus=self._gpus, batch_size=settings.batch_size)
            digest = engines.digest(bundle, engine)  # of another export of the same model it is another
            key = (model.name, bundle.version, engine, digest, str(settings.batch_size))
            loaded[key] = self._loaded.get(key) or self._served(model.name, bundle, engine, settings.batch_size)
            found.append((loaded[key], model.share))
        self._loaded = loaded
        return Models(found)

    def _served(self, name: str, bundle: Bundle, engine: str, batch_size: int) -> Served:
        if engine == engines.KERAS:
            startup.load_tensorflow(gpus=self._gpus)
        predictor = Predictor(bundle, engine=engine, threads=self._threads, batch_size=batch_size)
        size = bundle.info.image_size
        for count in _sizes(batch_size):
            predictor.probabilities(np.zeros((count, size, size, 3), np.uint8))
        log.info("serving %s %s of %s with %s", name, bundle.version, bundle.uri, engine)
        return Served(
            name=name,
            version=bundle.version,
            bundle=bundle,
            engine=engine,
            batcher=Batcher(predictor.probabilities, batch_size, self._executor, self._observe),
        )


def _sizes(largest: int) -> list[int]:
    """Sizes of batches that an engine is warmed up with: the powers of two, and the largest."""
    return sorted({1 << power for power in range(largest.bit_length()) if 1 << power <= largest} | {largest})
