"""The networks, by name. Each maps uint8 RGB (N, height, width, 3) to float32 probabilities (N, classes).

The network scales the pixels itself. The layer before the probabilities is called `logits`.
"""

from typing import TYPE_CHECKING, Literal

from cnnray.images.geometry import Size
from cnnray.models import own_network

if TYPE_CHECKING:
    import keras

_RESIDUAL = {
    # name: filters of the four stages
    "resnet9": (32, 64, 128, 256),
    "resnet9_small": (16, 32, 64, 128),
    "resnet9_large": (64, 128, 256, 512),
}

_PLAIN = {
    # name: (filters of each convolution, block by block; units of the dense layer)
    "vgg_bn": (((64, 64), (128, 128), (256, 256, 256), (512, 512)), 512),
    "small_cnn": (((32, 32), (64, 64), (128,)), 128),
}

# keras.applications: name -> (function, scaling that its published weights expect). `caffe`: BGR minus ImageNet's
# mean; `torch`: 0...1, normalised with ImageNet's mean and standard deviation; `tf`: -1...1; `inside`: the network
# scales the pixels itself.
_BACKBONES = {
    "convnextbase": ("ConvNeXtBase", "inside"),
    "convnextlarge": ("ConvNeXtLarge", "inside"),
    "convnextsmall": ("ConvNeXtSmall", "inside"),
    "convnexttiny": ("ConvNeXtTiny", "inside"),
    "convnextxlarge": ("ConvNeXtXLarge", "inside"),
    "densenet121": ("DenseNet121", "torch"),
    "densenet169": ("DenseNet169", "torch"),
    "densenet201": ("DenseNet201", "torch"),
    **{f"efficientnetb{i}": (f"EfficientNetB{i}", "inside") for i in range(8)},
    **{f"efficientnetv2b{i}": (f"EfficientNetV2B{i}", "inside") for i in range(4)},
    "efficientnetv2l": ("EfficientNetV2L", "inside"),
    "efficientnetv2m": ("EfficientNetV2M", "inside"),
    "efficientnetv2s": ("EfficientNetV2S", "inside"),
    "inceptionresnetv2": ("InceptionResNetV2", "tf"),
    "inceptionv3": ("InceptionV3", "tf"),
    "mobilenet": ("MobileNet", "tf"),
    "mobilenetv2": ("MobileNetV2", "tf"),
    "mobilenetv3large": ("MobileNetV3Large", "inside"),
    "mobilenetv3small": ("MobileNetV3Small", "inside"),
    "nasnetlarge": ("NASNetLarge", "tf"),
    "nasnetmobile": ("NASNetMobile", "tf"),
    "resnet101": ("ResNet101", "caffe"),
    "resnet101v2": ("ResNet101V2", "tf"),
    "resnet152": ("ResNet152", "caffe"),
    "resnet152v2": ("ResNet152V2", "tf"),
    "resnet50": ("ResNet50", "caffe"),
    "resnet50v2": ("ResNet50V2", "tf"),
    "vgg16": ("VGG16", "caffe"),
    "vgg19": ("VGG19", "caffe"),
    "xception": ("Xception", "tf"),
}

_SMALLEST = {
    # keras.applications rejects smaller images, or downsamples them to nothing.
    "inceptionresnetv2": 75,
    "inceptionv3": 75,
    "xception": 71,
    "vgg_bn": 16,
    "small_cnn": 8,
    **dict.fromkeys(_RESIDUAL, 8),
}

PLAIN: tuple[str, ...] = tuple(_PLAIN)
"""The article's networks."""
BACKBONES: tuple[str, ...] = tuple(_BACKBONES)
"""The architectures of `keras.applications`."""
NAMES: tuple[str, ...] = (*_RESIDUAL, *PLAIN, *BACKBONES)
"""Every architecture that `build` knows."""

Head = Literal["dense", "linear"]

_HEAD_UNITS = (512, 256)


_LAST = {"dtype": "float32", "name": "probabilities"}
"""Of the last layer."""


def smallest_image_size(architecture: str) -> int:
    """The smallest image, in pixels per side, that the architecture does not downsample to nothing."""
    return 1 if own_network.is_own(architecture) else _SMALLEST.get(architecture, 32)


def build(
    architecture: str,
    image_size: int | str | Size,
    classes: int,
    *,
    head: Head = "dense",
    dropout: float = 0.5,
    synchronized: bool = False,
    multi_label: bool = False,
    dtype: str = "float32",
) -> "keras.Model":
    """Build a network with random weights: a backbone, global pooling, and a head.

    Args:
        architecture: one of `NAMES`, or a network of one's own (see `own_network`), for which `head` and `dropout`
            mean nothing.
        image_size: of the images, as `Size.of` takes it.
        classes: number of classes.
        head: the layers between the pooling and the logits. `dense`: layers of 512 and 256 units with ReLU, each
            followed by dropout; in `vgg_bn` and `small_cnn`, one such layer. `linear`: dropout only.
        dropout: dropout rate before the logits. In a dense head of two layers, the second drops 0.6 of this rate.
            In `vgg_bn` and `small_cnn`, each block ends with half of this rate.
        synchronized: whether batch norm computes its statistics over the images of all workers.
        multi_label: whether an image may have several classes: each then has a probability of its own (a sigmoid);
            otherwise they sum to 1 (a softmax).
        dtype: a Keras dtype policy, such as `float32` or `mixed_bfloat16`. The probabilities are always float32.

    Returns:
        keras.Model from uint8 (N, height, width, 3) to float32 (N, classes).

    Raises:
        ValueError: the architecture is unknown.
        NetworkError: see `own_network.build`.
    """
    import keras

    is_own = own_network.is_own(architecture)
    if architecture not in NAMES and not is_own:
        raise ValueError(f"The architecture {architecture!r} is unknown; expected one of {', '.join(NAMES)}.")
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        pixels = keras.Input(Size.of(image_size).shape, dtype="uint8", name="image")
        if is_own:
            logits = own_network.build(architecture, pixels, classes)
        elif architecture in PLAIN:
            hidden = _add_convolutional_blocks(
                pixels, *_PLAIN[architecture], head=head, dropout=dropout, synchronized=synchronized
            )
        elif architecture in _RESIDUAL:
            features = _add_residual_stages(pixels, _RESIDUAL[architecture], synchronized)
            hidden = _add_head(keras.layers.GlobalMaxPooling2D()(features), head, dropout)
        else:
            features = _add_backbone(pixels, architecture)
            hidden = _add_head(keras.layers.GlobalAveragePooling2D()(features), head, dropout)
        if not is_own:
            logits = keras.layers.Dense(classes, dtype="float32", name="logits")(hidden)
        last = keras.layers.Activation("sigmoid", **_LAST) if multi_label else keras.layers.Softmax(**_LAST)
        probabilities = last(logits)
        model = keras.Model(pixels, probabilities, name=architecture.rpartition(":")[2].rpartition(".")[2])
        if architecture not in BACKBONES and not is_own:
            _remove_mean_of_first_kernels(model)
    finally:
        keras.config.set_dtype_policy(previous)
    if synchronized:
        for layer in model._flatten_layers():  # backbones build their own batch norms
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    return model


def _remove_mean_of_first_kernels(model: "keras.Model") -> None:
    """Make the first convolution respond to edges only, until it learns otherwise.

    With the usual random kernels, its outputs are mostly the colour of the ground, which varies far more than edges
    do. Where colours say nothing about the class, networks then learn nothing for thousands of steps
    (`jobs/benchmark.py causes` measures it).
    """
    from keras import layers, ops

    kernel = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D)).kernel
    kernel.assign(kernel - ops.mean(kernel, axis=(0, 1), keepdims=True))


def _add_convolutional_blocks(
    pixels: "keras.KerasTensor",
    blocks: tuple[tuple[int, ...], ...],
    units: int,
    *,
    head: Head,
    dropout: float,
    synchronized: bool,
) -> "keras.KerasTensor":
    """The article's network: blocks of 3x3 convolution, batch norm and ReLU, each followed by pooling and dropout.

    The convolutions have no bias. Batch norm would subtract it again, so the function is the same, and Adam would
    turn the rounding noise in its gradient into steps. The momentum of batch norm is 0.9. With Keras's 0.99, the
    moving statistics used in inference lag hundreds of steps behind.
    """
    from keras import layers, regularizers

    x = layers.Rescaling(1 / 255)(pixels)
    for block in blocks:
        for filters in block:
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.BatchNormalization(momentum=0.9, synchronized=synchronized)(x)
            x = layers.ReLU()(x)
        x = layers.MaxPooling2D(2)(x)
        x = layers.Dropout(dropout / 2)(x)
    x = layers.GlobalAveragePooling2D()(x)
    if head == "dense":
        x = layers.Dense(units, activation="relu", kernel_regularizer=regularizers.L2(0.01))(x)
    return layers.Dropout(dropout)(x)


def _add_residual_stages(
    pixels: "keras.KerasTensor", filters: tuple[int, int, int, int], synchronized: bool
) -> "keras.KerasTensor":
    """ResNet-9: eight 3x3 convolutions, each with batch norm and ReLU, two pairs of them with a shortcut.

    Sources: He et al., Deep Residual Learning, 2016 (the shortcuts); Page, How to Train Your ResNet, 2018 (the
    network, with global max pooling); Jordan, 94 % on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024.

    The stages work on 32 to 63 pixels of the shorter side. Larger images are brought to that by a stride of 2 in the
    first convolution, and by pooling behind it. So the kernels have the same shapes for all image sizes, and
    `transfer` can load them into a network for another size.
    """
    from keras import layers

    def convolution(x: "keras.KerasTensor", filters: int, strides: int = 1) -> "keras.KerasTensor":
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9, synchronized=synchronized)(x)
        return layers.ReLU()(x)

    def residual_pair(x: "keras.KerasTensor", filters: int) -> "keras.KerasTensor":
        return layers.Add()([x, convolution(convolution(x, filters), filters)])

    first, second, third, fourth = filters
    x = layers.Rescaling(1 / 255)(pixels)
    x = convolution(x, first, strides=2 if min(pixels.shape[1:3]) >= 64 else 1)
    while min(x.shape[1:3]) >= 64:
        x = layers.MaxPooling2D(2)(x)
    x = layers.MaxPooling2D(2)(convolution(x, second))
    x = residual_pair(x, second)
    x = layers.MaxPooling2D(2)(convolution(x, third))
    x = layers.MaxPooling2D(2)(convolution(x, fourth))
    return residual_pair(x, fourth)


def _add_head(features: "keras.KerasTensor", head: Head, dropout: float) -> "keras.KerasTensor":
    from keras import layers

    x = features
    if head == "linear":
        return layers.Dropout(dropout)(x)
    for units, rate in zip(_HEAD_UNITS, (dropout, 0.6 * dropout), strict=True):
        x = layers.Dense(units, activation="relu")(x)
        x = layers.Dropout(rate)(x)
    return x


def _add_backbone(pixels: "keras.KerasTensor", architecture: str) -> "keras.KerasTensor":
    backbone = build_backbone(architecture, Size(*pixels.shape[1:3]), None)
    return backbone(_scale_pixels(pixels, _BACKBONES[architecture][1]))


def build_backbone(architecture: str, image_size: int | str | Size, weights: str | None) -> "keras.Model":
    """Build a network of `keras.applications` without its classification layers, named after the architecture.

    Args:
        architecture: one of `BACKBONES`.
        image_size: of the images, as `Size.of` takes it.
        weights: `imagenet`, which Keras may have to download, or None for random weights.
    """
    import keras

    function = getattr(keras.applications, _BACKBONES[architecture][0])
    network = function(include_top=False, weights=weights, input_shape=Size.of(image_size).shape)
    # The name is not passed to the function, because EfficientNetV2 looks up its blocks by that argument.
    return keras.Model(network.input, network.output, name=architecture)


def scale_as_published(backbone: "keras.Model") -> None:
    """Give an EfficientNet (version 1) backbone the extra pixel scaling that its published weights were trained with.

    After normalisation, these weights expect a division by the square root of ImageNet's standard deviations. Keras
    adds a layer for it only when it downloads the weights itself. Here the factor goes into the variance of the
    normalisation layer, which computes the same. Other backbones are left unchanged.
    """
    import keras
    import numpy as np

    if not backbone.name.startswith("efficientnetb"):
        return
    normalization = next(layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization))
    normalization.adapt_variance.assign(normalization.adapt_variance * np.asarray([0.229, 0.224, 0.225]))
    normalization.finalize_state()


def _scale_pixels(pixels: "keras.KerasTensor", mode: str) -> "keras.KerasTensor":
    from keras import layers

    if mode == "inside":
        # Not every backbone casts uint8 in its first layer.
        return layers.Rescaling(1.0)(pixels)
    if mode == "tf":
        return layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)
    if mode == "torch":
        return layers.Rescaling(
            [1 / (255 * deviation) for deviation in (0.229, 0.224, 0.225)],
            offset=[-mean / deviation for mean, deviation in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))],
        )(pixels)
    centred = layers.Rescaling(1.0, offset=[-123.68, -116.779, -103.939])(pixels)
    return centred[..., ::-1]
