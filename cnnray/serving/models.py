"""The models that a replica has loaded, by name and version."""

import hashlib
import logging
import random
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from cnnray.errors import BadInputError
from cnnray.images.decode import BadImage
from cnnray.models import engines, startup
from cnnray.models.answers import Answer, Rules
from cnnray.models.bundle import Bundle, BundleError
from cnnray.models.drift import Distribution, SlidingWindow
from cnnray.models.predictor import Predictor
from cnnray.models.runtimes import Images
from cnnray.serving.batching import Batcher, batch_sizes
from cnnray.serving.pipeline import Encoded, Pipeline
from cnnray.serving.settings import ModelSettings, Settings
from cnnray.tracking.prometheus import ServingMetrics

log = logging.getLogger(__name__)


class NoSuchModelError(BadInputError, LookupError):
    """The name or version is not served; the message is one sentence for the client."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One version of a model, loaded and warmed up."""

    name: str
    version: str
    """`Bundle.version`."""
    bundle: Bundle
    engine: str
    digest: str
    """SHA-256 of the engine's file, in hexadecimal."""
    compute: Pipeline
    """Decodes and classifies a micro-batch."""
    batcher: Batcher[Encoded | Images, Answer | BadImage]
    """Collects the images of all requests into micro-batches for it."""
    recent: SlidingWindow | None = None
    """The answers of the last hour; None: the bundle does not say what they are to be compared with."""

    @property
    def key(self) -> tuple[str, str]:
        """Its name and version."""
        return self.name, self.version

    @property
    def rules(self) -> Rules:
        """How it answers."""
        return self.compute.rules

    def names(self, classes: Iterable[int]) -> list[str]:
        """The names of classes, from their indices."""
        return [self.bundle.info.class_names[index] for index in classes]


class Models:
    """All models that are served, and the share of the requests that each version answers."""

    def __init__(self, models: Iterable[tuple[ServedModel, float]]) -> None:
        """
        Args:
            models: each with its share, older versions of a name before newer ones. Where the shares of a name sum to
                less than 1, its main version gets the rest.
        """
        self._by_name: dict[str, list[tuple[ServedModel, float]]] = {}
        for model, share in models:
            self._by_name.setdefault(model.name, []).append((model, share))
        for versions in self._by_name.values():
            rest = 1 - sum(share for _, share in versions)
            if rest > 1e-6:
                main, (model, share) = max(enumerate(versions), key=lambda version: version[1][1])
                versions[main] = model, share + rest

    @property
    def names(self) -> list[str]:
        """The names of the models; the first is the default."""
        return list(self._by_name)

    @property
    def all(self) -> list[ServedModel]:
        """All versions of all models."""
        return [model for versions in self._by_name.values() for model, _ in versions]

    def main(self, name: str) -> ServedModel:
        """The version of a model that answers most of its requests.

        Raises:
            NoSuchModelError: it is not served.
        """
        return max(self.versions(name), key=lambda version: version[1])[0]

    def versions(self, name: str) -> list[tuple[ServedModel, float]]:
        """The versions of a model with their shares, older ones first.

        Raises:
            NoSuchModelError: it is not served.
        """
        if name not in self._by_name:
            raise NoSuchModelError(f"There is no model {reprlib.repr(name)}; served are {', '.join(self.names)}.")
        return self._by_name[name]

    def choose(self, name: str | None = None, version: str | None = None, key: str | None = None) -> ServedModel:
        """The version that answers a request: the requested one, or one according to the shares.

        Requests with the same key get the same version as long as the shares are the same; where the share of the
        newest one grows, those that had it keep it.

        Args:
            name: of the model; None: the first one.
            version: of it.
            key: of whoever asks; None: each request is for itself.

        Raises:
            NoSuchModelError: it is not served.
        """
        name = self.names[0] if name is None else name
        versions = self.versions(name)
        if version is None:
            if len(versions) == 1:
                return versions[0][0]
            point = random.random() if key is None else _fraction(f"{name} {key}")
            for model, share in versions[:-1]:
                point -= share
                if point < 0:
                    return model
            return versions[-1][0]
        for model, _ in versions:
            if model.version == version:
                return model
        known = ", ".join(model.version for model, _ in versions)
        raise NoSuchModelError(f"The model {name} has no version {reprlib.repr(version)}; it has {known}.")


def _fraction(text: str) -> float:
    """A number at least 0 and less than 1 that a text always has."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48


def find_engine(uri: str, engine: str, *, gpus: bool, batch_size: int) -> tuple[Bundle, str, str]:
    """A bundle, the name of the engine that runs it, and the SHA-256 of the engine's file.

    Args:
        uri: folder or s3:// prefix of the bundle.
        engine: its name, or auto; see `engines.choose`.
        gpus: whether there are GPUs.
        batch_size: largest micro-batch.

    Raises:
        BundleError, OSError: the bundle, or the engine's file, cannot be read, or the bundle has thresholds, but
            none for the engine.
    """
    bundle = Bundle.load(uri)
    if engine == "auto":
        engine = engines.choose(bundle, gpus=gpus, batch_size=batch_size)
    engines.check_exported(bundle, engine)
    engines.find_threshold(bundle, engine)
    return bundle, engine, engines.digest(bundle, engine)


@dataclass(frozen=True)
class _Asked:
    """What decides which model is loaded, besides the engine's file where that is not pinned."""

    name: str
    uri: str
    engine: str
    batch_size: int
    version: str | None
    digest: str | None


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was loaded for settings."""

    models: Models
    settings: Settings
    """With the version of each model."""
    problems: dict[tuple[str, str | None], str]
    """Why versions that are to answer requests are left out, by name and version."""


class Loader:
    """Loads the models of new settings while the present ones answer requests."""

    def __init__(self, *, threads: int, gpus: bool, metrics: ServingMetrics) -> None:
        """
        Args:
            threads: CPU threads of an engine, and of decoding.
            gpus: whether this process has a GPU.
            metrics: counts micro-batches and times their stages.
        """
        self._threads, self._gpus, self._metrics = threads, gpus, metrics
        self._loaded: dict[_Asked, ServedModel] = {}
        self._left_out: set[_Asked] = set()
        """Versions that were left out."""

    def __call__(self, settings: Settings, *, starts: bool) -> Loaded:
        """Load the models of these settings; models that the last call loaded are reused if they are the same.

        A version that cannot be loaded is left out where a decision about a canary has left it without requests. In a
        replica that starts, so is a canary, whose requests the main version gets: it must not keep the service from
        growing.

        Args:
            settings: the settings.
            starts: whether the replica has no models yet.

        Raises:
            BundleError, OSError: a bundle cannot be loaded, or is another one than was deployed, unless the last call
                has loaded it, or has left it out. The models of the last call are not affected.
        """
        loaded: dict[_Asked, ServedModel] = {}
        models: list[tuple[ServedModel, float]] = []
        pinned, problems, left_out = [], {}, set()
        for model in settings.models:
            try:
                asked, served = self._load_or_keep(model, settings)
            except Exception as error:  # an engine's library may raise anything
                asked = _asked(model, settings)
                if _is_missed(model, settings):
                    if asked not in self._left_out and not (starts and _may_come_later(model, settings)):
                        raise
                    problems[model.name, model.version] = str(error)
                log.warning("%s %s is left out: %s", model.name, model.version, error)
                left_out.add(asked)
                pinned.append(model)
                continue
            loaded[asked] = served
            models.append((served, model.share))
            pinned.append(replace(model, version=served.version))
        self._loaded, self._left_out = loaded, left_out
        return Loaded(models=Models(models), settings=replace(settings, models=tuple(pinned)), problems=problems)

    def _load_or_keep(self, model: ModelSettings, settings: Settings) -> tuple[_Asked, ServedModel]:
        """Load a model, or keep what the last call has loaded if it is the same, or if its bundle is gone."""
        asked = _asked(model, settings)
        try:
            bundle, engine, digest = find_engine(
                model.uri, asked.engine, gpus=self._gpus, batch_size=settings.batch_size
            )
            if model.version not in (None, bundle.version):
                raise BundleError(
                    f"{model.uri} holds {bundle.version} now, and {model.version} was deployed: deploy it again."
                )
            if model.digest not in (None, digest):
                raise BundleError(
                    f"{model.uri} holds another export for {engine} now than was deployed: deploy it again."
                )
        except (BundleError, OSError) as error:
            if asked not in self._loaded or model.version is None:
                raise
            # A rollback must not depend on the storage of what is rolled back.
            log.warning("%s %s stays as it was loaded: %s", model.name, model.version, error)
            return asked, self._loaded[asked]
        asked = replace(asked, version=bundle.version)
        served = self._loaded.get(asked)
        # Where they are not pinned, another export has another digest, or has made another engine the fastest.
        if served is None or (served.digest, served.engine) != (digest, engine):
            served = self._load(model.name, bundle, engine, digest, settings.batch_size)
        return asked, served

    def _load(self, name: str, bundle: Bundle, engine: str, digest: str, batch_size: int) -> ServedModel:
        if engine in engines.KERAS_POLICIES:
            startup.load_tensorflow(gpus=self._gpus)
        predictor = Predictor(bundle, engine=engine, threads=self._threads, batch_size=batch_size)
        size = bundle.info.geometry.image_size
        for count in batch_sizes(batch_size):
            rows = predictor.probabilities(np.zeros((count, *size.shape), np.uint8))
            if not np.isfinite(rows).all():
                raise BundleError(f"{bundle.uri}: the probabilities of a black image are not finite with {engine}.")
        log.info("serving %s %s from %s with %s", name, bundle.version, bundle.uri, engine)
        compute = Pipeline(
            predictor.probabilities, predictor.rules, bundle.info.geometry, self._metrics.record_stage,
            threads=self._threads,
        )  # fmt: skip
        reference = Distribution.from_dict(bundle.info.reference, len(bundle.info.class_names))
        # While the network runs on one micro-batch, other threads decode the next.
        at_once = 2 if self._threads > 1 else 1
        return ServedModel(
            name=name,
            version=bundle.version,
            bundle=bundle,
            engine=engine,
            digest=digest,
            compute=compute,
            batcher=Batcher(compute, batch_size, self._metrics.record_batch, threads=at_once),
            recent=SlidingWindow(reference) if reference and reference.images else None,
        )


def _asked(model: ModelSettings, settings: Settings) -> _Asked:
    engine = model.engine or settings.engine
    return _Asked(model.name, model.uri, engine, settings.batch_size, model.version, model.digest)


def _is_missed(model: ModelSettings, settings: Settings) -> bool:
    """Whether a version is needed: all are, but those that a decision about a canary has left without requests."""
    return model.share > 0 or not any(other.verdict for other in settings.models if other.name == model.name)


def _may_come_later(model: ModelSettings, settings: Settings) -> bool:
    """Whether a replica may start before it has a version: a canary, or one without requests."""
    newest = [other for other in settings.models if other.name == model.name][-1]
    return model.share == 0 or (model is newest and model.share < 1)
