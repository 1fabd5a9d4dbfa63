"""`images.decode` as TensorFlow operations, for a SavedModel that takes encoded JPEG and PNG bytes.

It follows the rules of `images.decode` (EXIF orientation, transparency over white, CMYK, 16 bits, anti-aliased
resizing) to within one level of 255, with two exceptions. JPEGs are never decoded at reduced scale, so single pixels
of large JPEGs differ by more. In a PNG without alpha channel and palette, the one transparent colour is opaque. The
number of pixels is limited only by TensorFlow. Every other format, such as HEIC, is refused.
"""

from typing import Any

import tensorflow as tf

from cnnray.images.geometry import Geometry, ResizeRule, Size

_ORIENTATIONS = (b"\x12\x01\x03\x00\x01\x00\x00\x00", b"\x01\x12\x00\x03\x00\x00\x00\x01\x00")
"""The bytes before the orientation value in EXIF (tag, type and count), for each byte order."""
_PNG = b"\x89PNG\r\n\x1a\n"
_HEAD = 2**16
"""Number of bytes at the start of the file that are searched for EXIF data."""


def decode(data: Any, geometry: Geometry) -> Any:
    """Decode one image.

    Args:
        data: string tensor of shape (), a JPEG or PNG.
        geometry: see `images.decode.decode`.

    Returns:
        uint8 (height, width, 3), RGB.

    Raises:
        InvalidArgumentError: at run time, if the bytes are neither JPEG nor PNG, or are damaged.
    """
    # TensorFlow's decoders accept other formats, too, and an animated WebP makes them write past their buffer.
    is_jpeg, is_png = tf.io.is_jpeg(data), tf.strings.substr(data, 0, len(_PNG)) == _PNG
    with tf.control_dependencies([tf.debugging.Assert(is_jpeg | is_png, ["Neither a JPEG nor a PNG."])]):
        data = tf.identity(data)
    image = tf.cond(is_jpeg, lambda: _decode_jpeg(data), lambda: _decode_png(data))
    image = _resize(_apply_orientation(image, _read_orientation(data)), geometry.decode_size, geometry.resize)
    image = geometry.centre(tf.ensure_shape(image, geometry.decode_size.shape))
    return tf.cast(tf.round(image), tf.uint8)


def _decode_jpeg(data: Any) -> Any:
    return tf.cast(tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE"), tf.float32)


def _decode_png(data: Any) -> Any:
    # Keep the number of channels: with channels=4, decode_png corrupts pixels of less than 8 bits.
    image = tf.cast(tf.io.decode_png(data), tf.float32)
    has_alpha = tf.shape(image)[2] % 2 == 0
    opaque = [[0, 0], [0, 0], [0, 1]]
    image = tf.cond(has_alpha, lambda: image, lambda: tf.pad(image, opaque, constant_values=255.0))
    colour, alpha = image[..., :-1], image[..., -1:] / 255
    over_white = tf.round(colour * alpha + 255 * (1 - alpha))
    return tf.broadcast_to(over_white, tf.concat([tf.shape(image)[:2], [3]], 0))


def _read_orientation(data: Any) -> Any:
    """The first EXIF orientation, 1 to 8; 1 if there is none."""
    head = tf.cast(tf.io.decode_raw(tf.strings.substr(data, 0, _HEAD), tf.uint8), tf.int32)
    orientations = tf.ones((0,), tf.int32)
    for pattern in _ORIENTATIONS:
        count = tf.maximum(tf.size(head) - len(pattern), 0)
        matches = [head[offset : offset + count] == byte for offset, byte in enumerate(pattern)]
        orientations = tf.concat([orientations, head[len(pattern) :][:count][tf.reduce_all(matches, 0)]], 0)
    orientations = orientations[(orientations >= 1) & (orientations <= 8)]
    return tf.concat([orientations, [1]], 0)[0]


def _apply_orientation(image: Any, orientation: Any) -> Any:
    """Turn the image upright: swap rows and columns for EXIF orientations 5 to 8, then mirror the axes."""
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    upside_down, mirrored = (3, 4, 7, 8), (2, 3, 6, 7)
    for axis, values in enumerate((upside_down, mirrored)):
        image = tf.cond(
            tf.reduce_any(orientation == tf.constant(values)),
            lambda image=image, axis=axis: tf.reverse(image, [axis]),
            lambda image=image: image,
        )
    return image


def _resize(image: Any, size: Size, resize: ResizeRule) -> Any:
    sides, wanted = tf.cast(tf.shape(image)[:2], tf.float32), tf.constant(size, tf.float32)
    scale, shift = wanted / sides, tf.zeros(2)
    if resize == "crop":
        scale = tf.fill((2,), tf.reduce_max(scale))
        shift = (wanted - sides * scale) / 2
    if resize == "pad":
        full = tf.argmin(scale)
        inner = tf.maximum(tf.round(sides / sides[full] * wanted[full]), 1)
        scale, shift = inner / sides, tf.round((wanted - inner) / 2)
    resized = tf.raw_ops.ScaleAndTranslate(
        images=image[None], size=size, scale=scale, translation=shift, kernel_type="triangle", antialias=True
    )
    return resized[0]
