"""The networks, by name. All take uint8 RGB (N, size, size, 3) and give float32 probabilities (N, classes).

Scaling of the pixels is inside the network. The layer before the softmax is called `logits`.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import keras

_OWN = {
    # name: (filters of each convolution, block by block; units of the dense layer)
    "vgg_bn": (((64, 64), (128, 128), (256, 256, 256), (512, 512)), 512),
    "small_cnn": (((32, 32), (64, 64), (128,)), 128),
}

# keras.applications: name -> (function, how its published weights expect the pixels). `caffe`: BGR, ImageNet's
# mean taken off; `torch`: 0...1, normalised by ImageNet's mean and deviation; `tf`: -1...1; `inside`: the
# network scales by itself.
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
    # keras.applications refuse, or cannot shrink, smaller images.
    "inceptionresnetv2": 75,
    "inceptionv3": 75,
    "xception": 71,
    "vgg_bn": 16,
    "small_cnn": 8,
}

BACKBONES: tuple[str, ...] = tuple(_BACKBONES)
"""Those of `keras.applications`."""
NAMES: tuple[str, ...] = (*_OWN, *BACKBONES)
"""Every architecture that `build` knows."""

Head = Literal["dense", "linear"]

_HEAD_UNITS = (512, 256)


def smallest_image_size(architecture: str) -> int:
    """The smallest image, in pixels a side, that the architecture's down-sampling leaves something of."""
    return _SMALLEST.get(architecture, 32)


def build(
    architecture: str,
    image_size: int,
    classes: int,
    *,
    head: Head = "dense",
    dropout: float = 0.5,
    synchronized: bool = False,
    dtype: str = "float32",
) -> "keras.Model":
    """Build a network with random weights: a backbone, global average pooling, and a head.

    Args:
        architecture: one of `NAMES`.
        image_size: height and width of the images in pixels.
        classes: number of classes.
        head: what is behind the pooling: `dense`, for the backbones layers of 512 and 256 units with ReLU, each with
            dropout, for the article's networks one layer; `linear`, dropout alone.
        dropout: share of units dropped while training in front of the last layer, or behind the first of two, of
            which the second then drops 0.6 of that; after each block of the article's networks half of it.
        synchronized: whether batch norm takes its statistics over all workers' images.
        dtype: a Keras dtype policy, such as `float32` or `mixed_bfloat16`; the probabilities are float32
            in any.

    Returns:
        keras.Model from uint8 (N, image_size, image_size, 3) to float32 (N, classes).

    Raises:
        ValueError: an unknown architecture.
    """
    import keras

    if architecture not in NAMES:
        raise ValueError(f"No architecture is called {architecture!r}; there are {', '.join(NAMES)}.")
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        pixels = keras.Input((image_size, image_size, 3), dtype="uint8", name="image")
        if architecture in _OWN:
            hidden = _convolutional(
                pixels, *_OWN[architecture], head=head, dropout=dropout, synchronized=synchronized
            )
        else:
            hidden = _with_head(_backbone(pixels, architecture), head, dropout)
        logits = keras.layers.Dense(classes, dtype="float32", name="logits")(hidden)
        probabilities = keras.layers.Softmax(dtype="float32", name="probabilities")(logits)
        model = keras.Model(pixels, probabilities, name=architecture)
    finally:
        keras.config.set_dtype_policy(previous)
    if synchronized:
        for layer in model._flatten_layers():  # backbones build their own batch norms
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.synchronized = True
    return model


def _convolutional(
    pixels: "keras.KerasTensor",
    blocks: tuple[tuple[int, ...], ...],
    units: int,
    *,
    head: Head,
    dropout: float,
    synchronized: bool,
) -> "keras.KerasTensor":
    """The article's network: blocks of 3x3 convolution, batch norm and ReLU, each closed by pooling and dropout.

    Its convolutions have no bias: the batch norm behind takes it off again (so the function is the same), and
    Adam makes steps of the rounding noise that is such a bias's gradient. The momentum of its batch norms is
    0.9, not Keras's 0.99, with which the statistics that inference reads lag hundreds of steps behind.
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


def _with_head(features: "keras.KerasTensor", head: Head, dropout: float) -> "keras.KerasTensor":
    from keras import layers

    x = layers.GlobalAveragePooling2D()(features)
    if head == "linear":
        return layers.Dropout(dropout)(x)
    for units, share in zip(_HEAD_UNITS, (dropout, 0.6 * dropout), strict=True):
        x = layers.Dense(units, activation="relu")(x)
        x = layers.Dropout(share)(x)
    return x


def _backbone(pixels: "keras.KerasTensor", architecture: str) -> "keras.KerasTensor":
    backbone = application(architecture, pixels.shape[1], None)
    return backbone(_scaled(pixels, _BACKBONES[architecture][1]))


def application(architecture: str, image_size: int, weights: str | None) -> "keras.Model":
    """The network of `keras.applications` without its classification layers, called as the architecture is."""
    import keras

    function = getattr(keras.applications, _BACKBONES[architecture][0])
    network = function(include_top=False, weights=weights, input_shape=(image_size, image_size, 3))
    # Not as an argument: EfficientNetV2 looks its blocks up by the name that it is given.
    return keras.Model(network.input, network.output, name=architecture)


def scale_as_published(backbone: "keras.Model") -> None:
    """Divide what the first version of EfficientNet normalises by the root of ImageNet's deviations once more.

    Other backbones are left as they are.

    Its published weights were trained so, and Keras adds a layer for it, but only where it fetches the weights
    itself. Here the layer's variance takes the factor in, which is the same.
    """
    import keras
    import numpy as np

    if not backbone.name.startswith("efficientnetb"):
        return
    normalization = next(layer for layer in backbone.layers if isinstance(layer, keras.layers.Normalization))
    normalization.adapt_variance.assign(normalization.adapt_variance * np.asarray([0.229, 0.224, 0.225]))
    normalization.finalize_state()


def _scaled(pixels: "keras.KerasTensor", mode: str) -> "keras.KerasTensor":
    from keras import layers

    if mode == "inside":
        # uint8 is not cast by the backbone's own first layer in every one of them.
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
