"""The flags of a recipe: how a network is trained. `config` joins them with the others."""

from dataclasses import dataclass, field
from typing import Literal

from cnnray import configs, flags
from cnnray.configs import rules
from cnnray.models.augment import Augmentations, Strength, check_alternatives
from cnnray.training.phases import PRESETS, Phase, Preset

DEFAULT_AUGMENT: Strength = "light"
"""What null stands for; it mirrors nothing."""

Precision = Literal["float32", "bfloat16", "float16"]
Optimizer = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "plateau"]
Effort = Literal["quick", "default", "accurate"]
ClassWeights = Literal["none", "balanced"]
Sampling = Literal["all", "balanced"]
Loss = Literal["cross_entropy", "focal", "asymmetric"]
Selection = Literal["val_accuracy", "val_loss", "macro_f1", "auroc", "mean_average_precision"]
SELECTIONS: dict[bool, tuple[Selection, ...]] = {
    False: ("val_accuracy", "val_loss", "macro_f1", "auroc"),
    True: ("mean_average_precision", "val_loss", "macro_f1", "auroc"),
}
"""What may choose the best epoch, by whether images may have several labels. The first is the default."""
GAMMAS: dict[Loss, float] = {"focal": 2.0, "asymmetric": 4.0}
"""Defaults of `loss_gamma`, as in the articles (see `losses`)."""


@configs.group(resumable=False)
@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """How the network is trained."""

    preset: Effort = "default"
    """How long to train for the sake of accuracy: quick, default or accurate; it decides the epochs and the network
    where they are null."""
    augment: Strength | None = None
    """How much training images are changed at random: none, light (turned, shifted, zoomed a little), standard (for
    photographs: also mirrored), strong (also mixed); null: light."""
    augmentations: Augmentations = field(default_factory=Augmentations)
    """Single switches on top of that."""
    preview_augmentations: int | None = field(
        default=None, metadata=rules(resumable=True, searchable=False, tracked=False)
    )
    """Write a picture of as many training images beside their changed versions into the output, and stop."""
    sanity: bool = field(default=False, metadata=rules(resumable=True, searchable=False, tracked=False))
    """Check in seconds that the network can learn the first 64 images by heart, and stop."""
    find_learning_rate: bool = field(default=False, metadata=rules(resumable=True, searchable=False, tracked=False))
    """Train a few steps with a learning rate that rises until the loss grows, write a plot into the output, and
    stop."""
    epochs: int | None = field(default=None, metadata=rules(resumable=True))
    """Passes over the training images, of each phase that does not state its own; null: by the number of images, the
    fewer the more."""
    phases: Preset | list[Phase] | None = None
    """head-first (the head, then all), article (the head, then the top 20 % of the backbone, then the top 50 %),
    prune (all, then zeros in 50 %, then in 80 % of each kernel), or a list in the YAML; null: one phase that trains
    all."""
    batch_size: int | None = None
    """Images of a step, over all workers together. An epoch is cut into equal steps of at most as many. null: 64, or
    one for each worker."""
    accumulate: int = 1
    """Steps whose gradients are averaged for one update."""
    learning_rate: float | None = None
    """Highest step size of the optimizer; null: 0.001 for backbones of keras.applications, else 0.003."""
    schedule: Schedule = "cosine"
    """How the learning rate changes: constant; cosine (up from zero, then down to zero, over each phase); or plateau
    (halved where the validation loss no longer falls, down to 1e-7)."""
    warmup_epochs: float | None = None
    """Epochs in which cosine rises; null: a tenth of the phase, at most 5 epochs."""
    warmup_steps: int | None = None
    """The same in steps."""
    decay_epochs: float | None = None
    """Epochs in which cosine falls; null: all the rest."""
    decay_steps: int | None = None
    """The same in steps."""
    plateau_patience: int = 5
    """Epochs without a lower validation loss before plateau halves the learning rate."""
    optimizer: Optimizer = "adamw"
    """The optimizer; sgd has a momentum of 0.9."""
    weight_decay: float | None = None
    """Share of the learning rate by which kernels shrink at each update; null: 0.01 with adamw, else 0."""
    clip_norm: float | None = None
    """Largest norm of the gradient, over all weights together; null: any."""
    average: float | None = None
    """The bundle holds the moving average of the weights with this momentum, such as 0.99; 0: the weights; null:
    0."""
    loss: Loss = "cross_entropy"
    """What training minimises. For images with several labels (binary) cross_entropy, focal or asymmetric: the last
    two weigh labels less that the network is sure of, asymmetric only those that an image does not have."""
    loss_gamma: float | None = None
    """How much less focal and asymmetric weigh what the network is sure of; null: 2 for focal, 4 for asymmetric."""
    label_smoothing: float | None = None
    """Share of each label that is spread over all classes, or, with several labels, over having it and not having it;
    null: 0."""
    class_weights: ClassWeights = "none"
    """balanced: images of rare classes weigh more in the loss, so that all classes weigh the same. With several
    labels, the images that have one weigh as much as those that do not, but at most 100 times as much for each."""
    sampling: Sampling = "all"
    """Images of an epoch: all, each once; or balanced: as many in all, but of each class the same number, so that
    those of rare classes come several times, and of frequent ones not all. (For images with one label each.)"""
    label_precision: float | None = None
    """With several labels: the precision of each label on the validation images that its threshold is fitted to, such
    as 0.9 (or the highest that there is); null: the threshold has the highest F1."""
    teacher: str | None = None
    """A bundle of the same classes and image size whose answers the network learns, too (distillation)."""
    distillation: float = 0.5
    """Share of the teacher's answers in the loss."""
    distillation_temperature: float = 3.0
    """Divisor of the logits of both networks; higher: more weight on the teacher's scores of the wrong classes."""
    precision: Precision | None = None
    """Type that the network computes in; weights, statistics, losses and the bundle stay float32. null: bfloat16 on
    GPUs that compute in it (such as A100, L4 and H100), else float32."""
    select: Selection | None = None
    """Metric of the validation images that chooses the best epoch: val_accuracy, val_loss, macro_f1 (the mean F1 of
    the classes, in which rare ones count as much), auroc (the mean area under their ROC curves); with several
    labels mean_average_precision in place of val_accuracy. null: val_accuracy, or mean_average_precision."""
    early_stopping_patience: int | None = None
    """End a phase after as many epochs without a lower validation loss; null: never."""
    seed: int = 0
    """Seed of the split, the initial weights, the order of the images, and all that is random in training."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a value that cannot work, in one sentence that names the flag.
        """
        # As YAML and JSON give them.
        if isinstance(self.augmentations, dict):
            object.__setattr__(self, "augmentations", Augmentations(**self.augmentations))
        if isinstance(self.phases, list):
            phases = [Phase(**phase) if isinstance(phase, dict) else phase for phase in self.phases]
            object.__setattr__(self, "phases", phases)
        flags.check_at_least_one(
            self, "epochs", "batch_size", "early_stopping_patience", "plateau_patience", "accumulate",
            "preview_augmentations",
        )  # fmt: skip
        flags.check_choices(
            self, preset=Effort, augment=Strength, optimizer=Optimizer, schedule=Schedule, class_weights=ClassWeights,
            precision=Precision, sampling=Sampling, select=Selection, loss=Loss,
        )  # fmt: skip
        flags.check_more_than_zero(self, "learning_rate", "clip_norm", "distillation_temperature")
        flags.check_not_negative(
            self, "weight_decay", "warmup_epochs", "warmup_steps", "decay_epochs", "decay_steps", "loss_gamma"
        )
        flags.check_below_one(self, "average", "label_smoothing", "label_precision")
        if self.loss_gamma is not None and self.loss not in GAMMAS:
            raise ValueError(f"--loss-gamma is of --loss {' and '.join(GAMMAS)}, not of {self.loss}.")
        flags.check_share(self, "distillation")
        check_alternatives(self.augment or DEFAULT_AUGMENT, self.augmentations)
        if isinstance(self.phases, str) and self.phases not in PRESETS:
            raise ValueError(f"--phases {self.phases!r} is not known; there are {', '.join(PRESETS)}, or a list.")
        if isinstance(self.phases, list) and not self.phases:
            raise ValueError("--phases is empty.")
        if self.sampling == "balanced" and self.class_weights == "balanced":
            raise ValueError("--sampling balanced and --class-weights balanced do the same: give one of them.")
        self._check_schedule()
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError("--weight-decay: adam with it is --optimizer adamw.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed must be at least 0 and less than 2**32, not {self.seed}.")
        flags.make_absolute(self, "teacher")

    def _check_schedule(self) -> None:
        for part in ("warmup", "decay"):
            given = [name for name in (f"{part}_epochs", f"{part}_steps") if getattr(self, name) is not None]
            if given and self.schedule != "cosine":
                raise ValueError(f"{flags.flag_name(given[0])} is of --schedule cosine, not of {self.schedule}.")
            if len(given) > 1:
                raise ValueError(
                    f"{flags.flag_name(given[0])} and {flags.flag_name(given[1])} say the same: give one of them."
                )
