"""`images.decode` as TensorFlow operations, for a SavedModel that takes encoded JPEG and PNG bytes.

It keeps the rules of `images.decode` (EXIF orientation, transparency over white, CMYK, 16 bits, anti-aliased
resizing) to one level of 255, except that JPEGs are never decoded at reduced scale (by which single pixels of large
ones differ by much more), and that the one transparent colour of a PNG without alpha channel and palette is opaque.
There is no limit to an image's pixels but TensorFlow's own.
"""

from typing import Any

import tensorflow as tf

from cnnray.images.decode import ResizeRule

_ORIENTATIONS = (b"\x12\x01\x03\x00\x01\x00\x00\x00", b"\x01\x12\x00\x03\x00\x00\x00\x01\x00")
"""What stands in front of the orientation in EXIF, by byte order: its tag, type and count."""
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 2**16
"""Bytes that the EXIF data are looked for in."""


def decode(data: Any, size: int, resize: ResizeRule) -> Any:
    """Decode one image.

    Args:
        data: string (), a JPEG or PNG.
        size: height and width of the result in pixels.
        resize: see `images.decode.decode`.

    Returns:
        uint8 (size, size, 3), RGB.

    Raises:
        InvalidArgumentError: (when it runs) the bytes are neither, or damaged.
    """
    # TensorFlow's decoders take other types too, and an animated WebP makes them write past their buffer.
    is_jpeg, is_png = tf.io.is_jpeg(data), tf.strings.substr(data, 0, len(_PNG)) == _PNG
    with tf.control_dependencies([tf.debugging.Assert(is_jpeg | is_png, ["Neither a JPEG nor a PNG."])]):
        data = tf.identity(data)
    image = tf.cond(is_jpeg, lambda: _jpeg(data), lambda: _png(data))
    image = tf.ensure_shape(_resized(_turned(image, _orientation(data)), size, resize), (size, size, 3))
    return tf.cast(tf.round(image), tf.uint8)


def _jpeg(data: Any) -> Any:
    return tf.cast(tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"), tf.float32)


def _png(data: Any) -> Any:
    # As many channels as there are: asked for 4, decode_png spoils pixels of less than 8 bits.
    image = tf.cast(tf.io.decode_png(data), tf.float32)
    has_alpha = tf.shape(image)[2] % 2 == 0
    opaque = [[0, 0], [0, 0], [0, 1]]
    image = tf.cond(has_alpha, lambda: image, lambda: tf.pad(image, opaque, constant_values=255.0))
    colour, alpha = image[..., :-1], image[..., -1:] / 255
    over_white = tf.round(colour * alpha + 255 * (1 - alpha))
    return tf.broadcast_to(over_white, tf.concat([tf.shape(image)[:2], [3]], 0))


def _orientation(data: Any) -> Any:
    """The first EXIF orientation, 1 to 8; 1 where there is none."""
    head = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 0, _HEAD), tf.uint8), tf.int32)
    found = tf.ones((0,), tf.int32)
    for pattern in _ORIENTATIONS:
        count = tf.maximum(tf.size(head) - len(pattern), 0)
        same = [head[place : place + count] == byte for place, byte in enumerate(pattern)]
        found = tf.concat([found, head[len(pattern) :][:count][tf.reduce_all(same, 0)]], 0)
    found = found[(found >= 1) & (found <= 8)]
    return tf.concat([found, [1]], 0)[0]


def _turned(image: Any, orientation: Any) -> Any:
    """The image as it is meant to be looked at: EXIF 5 to 8 swap rows and columns, and then each mirrors."""
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    upside_down, mirrored = (3, 4, 7, 8), (2, 3, 6, 7)
    for axis, values in enumerate((upside_down, mirrored)):
        image = tf.cond(
            tf.reduce_any(orientation == tf.constant(values)),
            lambda image=image, axis=axis: tf.reverse(image, [axis]),
            lambda image=image: image,
        )
    return image


def _resized(image: Any, size: int, resize: ResizeRule) -> Any:
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    scale, shift = size / sides, tf.zeros(2)
    if resize == "crop":
        short = tf.reduce_min(sides)
        scale = tf.fill((2,), size / short)
        shift = (short - sides) / 2 * scale
    if resize == "pad":
        inner = tf.maximum(tf.round(sides / tf.reduce_max(sides) * size), 1)
        scale, shift = inner / sides, tf.round((size - inner) / 2)
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=(size, size), scale=scale, translation=shift, kernel_type="triangle", antialias=True
    )
    return resized[0]
