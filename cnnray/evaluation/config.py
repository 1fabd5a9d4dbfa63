"""The config of an evaluation: every field is a flag of jobs/evaluate.py and a key of its YAML."""

from dataclasses import dataclass
from typing import Literal

from cnnray import configs, flags
from cnnray.images import labels, storage
from cnnray.models import engines
from cnnray.prediction.config import AveragingOptions, InferenceOptions, PredictConfig

Split = Literal["auto", "all", "train", "validation", "test"]

PREDICTIONS = "predictions"
"""Folder of the prediction run, in the output of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceOptions, AveragingOptions):
    """Measure a bundle on labelled images and write a report; with --check-data, only check the images; with --drift,
    compare what a service has answered with what it answered to its validation images."""

    data: str | None = None
    """Labelled images: a folder or s3:// prefix of class folders (or of train, validation and test with class folders
    in each), a CSV, JSONL or Parquet table with the columns uri and label, or the manifest.parquet of a training.
    With --drift: the images to compare with, in place of the bundle's validation images; they need no labels."""
    multi_label: bool | None = None
    """Whether files of the same name in several class folders are one image with several labels; null: where the
    bundle has several labels for an image."""
    label_separator: str | None = None
    """What stands between the labels of an image in a column of text, such as |; an empty one then has no label."""
    bundle: str | None = None
    """Folder or s3:// prefix of the bundle; not needed with --check-data."""
    output: str | None = None
    """Folder or s3:// prefix for the report; not needed with --check-data. An interrupted evaluation resumes when it
    is started again with the same output."""
    split: Split = "auto"
    """Split to evaluate, where the data have splits: train, validation, test or all; auto: test, else
    validation, else all (with --drift, or --calibrate alone, validation comes before test)."""
    calibrate: bool = False
    """Fit a temperature to these images, so that confidences match accuracy, and publish a bundle with it in the
    output's folder bundle; the evaluated bundle is not changed. Use images that the network was not trained on. Needs
    an engine with float32 probabilities; auto: keras."""
    wanted_accuracy: float = 0.99
    """Accuracy for which the report gives the lowest confidence threshold that reaches it on these images, and the
    lowest that reaches it, with --certainty, on others like them. For the latter use images by which training did not
    choose its weights, either, such as those of a split test."""
    target_precision: float | None = None
    """Publish a bundle, in the output's folder bundle, that answers only where it is confident, so that at least this
    share of its answers to other images like these is right (1 minus the accepted risk). Of the rest it is unsure,
    and names candidates. Use images as for --wanted-accuracy, which it replaces. auto: keras, and every other engine
    of the bundle with another numeric precision; each has its own threshold."""
    hierarchy: str | None = None
    """Groups of the classes: a CSV table with the columns class and group, or YAML or JSON, such as `cat: animal`.
    The report then has the accuracy by group, and the bundle that --target-precision publishes names the group of an
    image whose class it is unsure of, with the same guarantee. null: the groups of the bundle, if it has some."""
    certainty: float = 0.95
    """Probability with which a guarantee holds; with --target-precision also about the share of the images without an
    answer whose class is among the candidates."""
    samples: int = 16
    """Images in each image grid of the report, at most 100."""
    data_checks: bool = True
    """Include the findings of --check-data in the report; skipped for more than 50,000 images."""
    retry_errors: bool = False
    """Repeat those parts of an earlier evaluation in which images could not be read."""
    compare: str | None = None
    """The metrics.json of another evaluation of the same images, to compare with."""
    max_drop: float = 0.01
    """With --compare: largest accepted loss of accuracy. The job ends with exit code 0 if the whole 95 % confidence
    interval of the loss is at most this, 1 if it is more than this, and 3 (undecided) if this lies inside it."""
    max_error_fraction: float = 0.01
    """With --compare: refuse to compare if a larger share of the images has no prediction, in either evaluation."""
    drift: str | None = None
    """Request log, as `jobs/serve.py --log-requests` writes it: report how the answers of each window of time differ
    from those to the validation images, by classes and confidences; by embeddings, too, where the log keeps images
    and --data is given."""
    labels: str | None = None
    """With --drift: labels that came later, a CSV, JSONL or Parquet table with the columns request_id, label, and
    index (an image's place in its request, from 0) where requests have several images. They give the accuracy of each
    window."""
    window_hours: float = 24.0
    """With --drift: length of a window. Windows begin at 1970-01-01 UTC."""
    check_data: bool = False
    """Only look for images in two splits or under two labels, unreadable images, odd sizes and small classes."""
    overwrite: bool = False
    """Replace an evaluation of other images, or of another bundle, in the output."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: an invalid value; the message is one sentence that names the flag.
        """
        if not 1 <= self.samples <= 100:
            raise ValueError(f"--samples must be 1 to 100, not {self.samples}.")
        flags.check_share(self, "wanted_accuracy", "max_drop", "max_error_fraction")
        for flag in ("target_precision", "certainty"):
            if (share := getattr(self, flag)) is not None and not 0 < share < 1:
                raise ValueError(f"{flags.flag_name(flag)} must be more than 0 and less than 1, not {share:g}.")
        flags.check_more_than_zero(self, "window_hours")
        labels.check_flags(self.multi_label, self.label_separator)
        flags.make_absolute(self, "data", "bundle", "output", "compare", "hierarchy", "drift", "labels")
        self._check_drift()
        self.check_averaging(self.bundle, self.engine)
        if not self.check_data:
            for flag in ("bundle", "output"):
                if getattr(self, flag) is None:
                    raise ValueError(f"--{flag} is needed, unless with --check-data.")
            if self.data and f"{self.output}/".startswith(f"{self.data}/"):
                raise ValueError(f"--output {self.output} lies in --data {self.data}: it would be read as data.")
            if f"{self.bundle}/".startswith(f"{self.output}/"):
                raise ValueError(f"--output {self.output} holds --bundle {self.bundle}: give another folder.")
            _ = self.predict_config("")  # checks the inherited flags
            rounded = [name for name, runner in engines.RUNNERS.items() if runner.tolerance is None]
            if self.calibrate and self.engine in rounded:
                raise ValueError(f"--calibrate needs finer probabilities than those of --engine {self.engine}.")

    def _check_drift(self) -> None:
        """
        Raises:
            ValueError: flags of --drift without it, or others beside it, in one sentence.
        """
        if self.drift is None:
            if self.data is None:
                raise ValueError("--data is needed, unless with --drift.")
            if self.labels is not None or self.window_hours != 24:
                raise ValueError("--labels and --window-hours need --drift.")
        else:
            others = (
                "calibrate", "target_precision", "hierarchy", "compare", "check_data", "retry_errors", "ensemble",
                "tta",
            )  # fmt: skip
            if given := [name for name in others if getattr(self, name)]:
                raise ValueError(f"{flags.flag_name(given[0])} does not go with --drift.")
            if f"{self.output}/".startswith(f"{self.drift}/"):
                raise ValueError(f"--output {self.output} lies in --drift {self.drift}: it would be read as its log.")

    @property
    def publishes(self) -> bool:
        """Whether a bundle is published."""
        return self.calibrate or self.target_precision is not None

    def predict_config(
        self, manifest: str, bundle: str | None = None, engine: str | None = None, folder: str = PREDICTIONS
    ) -> PredictConfig:
        """The config of the prediction run that classifies the images of this evaluation.

        Args:
            manifest: uri of the manifest of the images; empty: `data`.
            bundle, engine: that run; None: those of the flags.
            folder: of the run, in the output.
        """
        assert self.bundle is not None
        assert self.output is not None
        shared = configs.fields_of(self, InferenceOptions)
        if self.publishes and self.engine == "auto":
            shared["engine"] = engines.KERAS  # probabilities of int8 engines are too coarse to fit a temperature to
        if engine:
            shared["engine"] = engine
        return PredictConfig(
            **shared,
            bundle=bundle or self.bundle,
            input=manifest or self.data or self.drift or "",
            output=storage.join(self.output, folder),
            probabilities=True,
            max_error_fraction=1.0,
            retry_errors=self.retry_errors,
            overwrite=self.overwrite,
        )
