"""Turns stored images into network inputs.

JAX crops and flips small images on the device; tf.data decodes and crops large ones on the host.
Both are uint8 until `normalize` converts them to float32 on the device.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# Of JPEGs that are written.
_QUALITY = 90
# Decodes JPEGs to the same pixels as Pillow; TensorFlow's default differs by 1.2 levels on average.
_ACCURATE = 'INTEGER_ACCURATE'


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Subtracts the mean of each channel and divides by its standard deviation.

  Args:
    images: [..., channels], uint8.
    mean, std: [channels], for pixels between 0 and 1.

  Returns:
    An array of the same shape, float32.
  """
  mean_pixel, std_pixel = 255 * jnp.asarray(mean), 255 * jnp.asarray(std)
  return (images.astype(jnp.float32) - mean_pixel) / std_pixel


def draw_crops(keys: jax.Array, padding: int, flip: bool) -> tuple[jax.Array, jax.Array]:
  """Draws how images are cropped and mirrored, for `crop_and_flip`.

  Args:
    keys: [batch] PRNG keys, one per image.
    padding: Number of zeros on every side.
    flip: Whether to mirror half of the images.

  Returns:
    The corner of each crop in the padded image [batch, 2], and whether it is mirrored [batch].
  """

  def draw(key):
    crop_key, flip_key = jax.random.split(key)
    corner = jax.random.randint(crop_key, (2,), 0, 2 * padding + 1)
    return corner, jax.random.bernoulli(flip_key) & flip

  return jax.vmap(draw)(keys)


def crop_and_flip(
  images: jax.Array, corners: jax.Array, mirrored: jax.Array, padding: int
) -> jax.Array:
  """Zero-pads images, crops them to their original size and mirrors some of them.

  Args:
    images: [batch, height, width, channels].
    corners: [batch, 2], from `draw_crops`.
    mirrored: [batch], from `draw_crops`.
    padding: Number of zeros on every side.

  Returns:
    An array of the same shape and type.
  """

  def crop(image, corner, mirror):
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)
    return jnp.where(mirror, image[:, ::-1], image)

  return jax.vmap(crop)(images, corners, mirrored)


def decode_random_crop(encoded: Any, size: int, min_area: float, flip: bool, seed: Any) -> Any:
  """Decodes a random crop of an image, resized and possibly mirrored (Szegedy et al., 2015).

  Its aspect ratio is from 3/4 to 4/3.

  Args:
    encoded: Scalar string tensor, an encoded image.
    size: Side of the result in pixels.
    min_area: Minimum share of the image that the crop covers.
    flip: Whether to mirror half of the images.
    seed: [2] integer tensor that determines the crop and the mirroring.

  Returns:
    [size, size, 3], uint8.
  """
  import tensorflow as tf

  begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
    _encoded_shape(encoded),
    bounding_boxes=tf.zeros((1, 0, 4)),
    seed=seed,
    min_object_covered=0,
    aspect_ratio_range=(3 / 4, 4 / 3),
    area_range=(min_area, 1.0),
    max_attempts=10,
    use_image_if_no_bounding_boxes=True,
  )
  reduction = tf.reduce_min(extent[:2]) // size
  window = tf.concat([begin[:2], extent[:2]], axis=0)
  image = _decode_window(encoded, window, reduction)
  # Antialiasing takes several times as long, and changes nothing where nothing shrinks; little, up
  # to 8/7.
  image = tf.cond(
    tf.reduce_any(tf.shape(image)[:2] > size * 8 // 7),
    lambda: tf.image.resize(image, (size, size), antialias=True),
    lambda: tf.image.resize(tf.cast(image, tf.float32), (size, size)),
  )
  image = tf.cast(image + 0.5, tf.uint8)
  return tf.image.stateless_random_flip_left_right(image, seed + 1) if flip else image


def decode_center_crop(encoded: Any, size: int) -> Any:
  """Decodes and resizes the central square of an image, 7/8 of its shorter side.

  At 224 pixels this is the usual evaluation: resize the shorter side to 256, then crop the centre.

  Args:
    encoded: Scalar string tensor, an encoded image.
    size: Side of the result in pixels.

  Returns:
    [size, size, 3], uint8.
  """
  import tensorflow as tf

  shape = _encoded_shape(encoded)[:2]
  side = tf.reduce_min(shape) * 7 // 8
  corner = (shape - side) // 2
  image = _decode_window(encoded, tf.concat([corner, [side, side]], axis=0))
  return _resize(image, (size, size))


def shrink_jpeg(encoded: Any, shorter_side: int) -> Any:
  """Resizes a JPEG whose shorter side is longer; returns other images as they are.

  Args:
    encoded: Scalar string tensor, an encoded image.
    shorter_side: In pixels.

  Returns:
    Scalar string tensor.
  """
  import tensorflow as tf

  def shrink():
    image = tf.io.decode_jpeg(encoded, channels=3, dct_method=_ACCURATE)
    sides = tf.cast(tf.shape(image)[:2], tf.float32)
    image = _resize(image, tf.cast(tf.round(sides * shorter_side / tf.reduce_min(sides)), tf.int32))
    return tf.io.encode_jpeg(image, quality=_QUALITY, optimize_size=True)

  shrinks = tf.io.is_jpeg(encoded) & (tf.reduce_min(_encoded_shape(encoded)[:2]) > shorter_side)
  return tf.cond(shrinks, shrink, lambda: encoded)


def _encoded_shape(encoded):
  import tensorflow as tf

  return tf.cond(
    tf.io.is_jpeg(encoded),
    lambda: tf.io.extract_jpeg_shape(encoded),
    lambda: tf.shape(tf.io.decode_image(encoded, channels=3, expand_animations=False)),
  )


def _decode_window(encoded, window, reduction=1):
  """Decodes a window (top, left, height, width) of an image.

  Of a JPEG, only the window is decoded, at 1/2, 1/4 or 1/8 of its size if `reduction` is at least
  2, 4 or 8.
  """
  import tensorflow as tf

  def decode_jpeg(ratio):
    return tf.image.decode_and_crop_jpeg(
      encoded, window // ratio, channels=3, ratio=ratio, dct_method=_ACCURATE
    )

  def crop_decoded():
    is_png = tf.strings.substr(encoded, 0, 4) == b'\x89PNG'
    image = tf.cond(
      is_png,
      lambda: _decode_png_on_white(encoded),
      lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )
    return tf.slice(image, tf.concat([window[:2], [0]], 0), tf.concat([window[2:], [3]], 0))

  exponent = tf.math.count_nonzero(reduction >= tf.constant([2, 4, 8]), dtype=tf.int32)
  return tf.cond(
    tf.io.is_jpeg(encoded),
    lambda: tf.switch_case(exponent, [partial(decode_jpeg, ratio) for ratio in (1, 2, 4, 8)]),
    crop_decoded,
  )


def _resize(image, size):
  import tensorflow as tf

  image = tf.image.resize(image, size, antialias=True)
  return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def _decode_png_on_white(encoded):
  """Decodes a PNG like imta_jax.data.image_files: transparent pixels are composited on white."""
  import tensorflow as tf

  pixels = tf.cast(tf.io.decode_png(encoded, channels=4), tf.float32)
  alpha = pixels[..., 3:] / 255
  return tf.cast(tf.round(alpha * pixels[..., :3] + (1 - alpha) * 255), tf.uint8)
