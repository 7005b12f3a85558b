"""Preprocessing: normalization, crops and flips."""

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from imta_jax.data import image_files, preprocess


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def random_images(count, height=5, width=7, channels=3):
  shape = (count, height, width, channels)
  return np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)


@partial(jax.jit, static_argnums=(2, 3))
def crop_with_keys(keys, images, padding, flip):
  return preprocess.crop_and_flip(images, *preprocess.draw_crops(keys, padding, flip), padding)


def crop_and_flip(images, padding, flip, seed=0, order=slice(None)):
  outputs = crop_with_keys(keys(len(images), seed)[order], images[order], padding, flip)
  assert (outputs.shape, outputs.dtype) == (images.shape, images.dtype)
  return np.asarray(outputs)


def crops(image, padding):
  """Returns {crop: its corner} for all crops of a zero-padded image."""
  padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
  height, width, _ = image.shape
  return {
    padded[top : top + height, left : left + width].tobytes(): (top, left)
    for top in range(2 * padding + 1)
    for left in range(2 * padding + 1)
  }


def test_normalize_follows_the_formula():
  images = random_images(2)
  mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
  normalized = preprocess.normalize(jnp.asarray(images), mean, std)
  assert normalized.dtype == jnp.float32
  np.testing.assert_allclose(
    normalized, (images / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6
  )


def test_every_output_is_a_crop_of_the_padded_image_or_its_mirror():
  padding, count = 2, 400
  images = random_images(count)
  corners, mirrored = [], []
  for image, output in zip(images, crop_and_flip(images, padding, True), strict=True):
    choices = crops(image, padding)
    plain, mirror = output.tobytes(), output[:, ::-1].tobytes()
    assert (plain in choices) != (mirror in choices)
    mirrored.append(mirror in choices)
    corners.append(choices[mirror if mirrored[-1] else plain])
  assert 0.4 < np.mean(mirrored) < 0.6
  # All 25 corners come up, none of them more often than chance has it.
  counts = np.unique(corners, axis=0, return_counts=True)[1]
  assert len(counts) == 25
  assert counts.max() < 40
  # The corner says nothing about the flip.
  assert abs(np.corrcoef(np.array(corners)[:, 1], mirrored)[0, 1]) < 0.2


def test_without_flip_every_output_is_a_crop():
  images = random_images(8)
  for image, output in zip(images, crop_and_flip(images, 1, False), strict=True):
    assert output.tobytes() in crops(image, 1)


def test_augmentation_is_a_function_of_the_key_alone():
  images = random_images(8)
  outputs = crop_and_flip(images, 2, True)
  np.testing.assert_array_equal(outputs, crop_and_flip(images, 2, True))
  assert np.any(outputs != crop_and_flip(images, 2, True, seed=1))
  # Nor does it depend on the images beside it.
  order = np.random.default_rng(0).permutation(8)
  np.testing.assert_array_equal(crop_and_flip(images, 2, True, order=order), outputs[order])


def encode(pixels, kind):
  content = io.BytesIO()
  options = {'quality': 95, 'subsampling': 0} if kind == 'JPEG' else {}
  Image.fromarray(pixels).save(content, kind, **options)
  return content.getvalue()


def ramp(height, width):
  """Returns an image that encodes positions: red grows to the right, green downwards."""
  rows, columns = np.mgrid[0:height, 0:width]
  pixels = np.stack(
    [255 * columns / (width - 1), 255 * rows / (height - 1), np.full((height, width), 128)], -1
  )
  return pixels.round().astype(np.uint8)


@pytest.fixture(params=['JPEG', 'PNG'])
def kind(request):
  return request.param


def crop_with_tensorflow(encoded, seed, size=16, min_area=0.08, flip=False):
  seed = np.array(seed, np.int64)
  return preprocess.decode_random_crop(encoded, size, min_area, flip, seed).numpy()


def crop_with_pillow(encoded, seed, size=16, min_area=0.08, flip=False):
  image = image_files.decode_rgb(io.BytesIO(encoded), 1_000)
  return image_files.random_crop(image, size, min_area, flip, np.random.default_rng(seed))


@pytest.fixture(params=[crop_with_tensorflow, crop_with_pillow])
def random_crop(request):
  return request.param


def center_crop(encoded, size):
  return preprocess.decode_center_crop(encoded, size).numpy()


def test_random_crops_are_functions_of_the_seed(kind, random_crop):
  encoded = encode(ramp(40, 60), kind)
  first = random_crop(encoded, (3, 5), flip=True)
  assert (first.shape, first.dtype) == ((16, 16, 3), np.uint8)
  np.testing.assert_array_equal(first, random_crop(encoded, (3, 5), flip=True))
  for other in ((3, 6), (4, 5)):
    assert np.any(first != random_crop(encoded, other, flip=True))


@pytest.mark.parametrize('min_area', [0.08, 0.6])
def test_random_crops_are_parts_of_the_image_at_fair_aspect_ratios(kind, min_area, random_crop):
  height, width = 80, 120
  encoded = encode(ramp(height, width), kind)
  areas = []
  for seed in range(40):
    image = random_crop(encoded, (0, seed), 32, min_area).astype(float)
    # Red and green at the middle of the sides give the part that was cropped.
    left, right = image[:, 1, 0].mean(), image[:, -2, 0].mean()
    top, bottom = image[1, :, 1].mean(), image[-2, :, 1].mean()
    across = (right - left) / 255 * (width - 1) * 32 / 29
    down = (bottom - top) / 255 * (height - 1) * 32 / 29
    assert 0.6 < across / down < 1.7
    areas.append(across * down / (height * width))
  assert 0.9 * min_area - 0.03 < min(areas) < 1.1 * min_area + 0.2
  assert 0.6 < max(areas) <= 1.1


def test_crops_are_resized_like_pillow_s(kind):
  # Noise in squares of 4 pixels, which differs by 20 without antialiasing.
  noise = np.random.default_rng(0).integers(0, 256, (66, 99, 3), np.uint8).repeat(4, 0).repeat(4, 1)
  for height, width in ((20, 30), (72, 73), (74, 72), (100, 150), (264, 396)):
    encoded = encode(noise[:height, :width], kind)
    image = crop_with_tensorflow(encoded, (0, 0), 64, min_area=1.0)  # Only the whole image fits.
    whole = Image.open(io.BytesIO(encoded)).resize((64, 64), Image.Resampling.BILINEAR)
    is_reduced = kind == 'JPEG' and height == 264  # Decoded at a quarter of its size.
    # Shrunk by 9/8, it is not antialiased.
    tolerance = 6 if is_reduced else 3 if height == 72 else 0.6
    assert np.abs(image - np.asarray(whole).astype(int)).mean() < tolerance


def test_random_crops_are_mirrored_half_the_time_where_asked(kind, random_crop):
  encoded = encode(ramp(40, 60), kind)
  mirrored = 0
  for seed in range(40):
    plain = random_crop(encoded, (0, seed))
    image = random_crop(encoded, (0, seed), flip=True)
    assert plain[:, 0, 0].mean() < plain[:, -1, 0].mean()
    is_mirrored = np.array_equal(image, plain[:, ::-1])
    assert is_mirrored or np.array_equal(image, plain)
    mirrored += is_mirrored
  assert 10 <= mirrored <= 30


@pytest.mark.parametrize('shape', [(64, 96), (96, 64)])
def test_center_crops_are_the_middle_seven_eighths_of_the_shorter_side(shape, kind):
  height, width = shape
  pixels = ramp(height, width)
  image = center_crop(encode(pixels, kind), 56)  # 7/8 of 64: nothing is resized.
  assert (image.shape, image.dtype) == ((56, 56, 3), np.uint8)
  top, left = (height - 56) // 2, (width - 56) // 2
  expected = pixels[top : top + 56, left : left + 56].astype(int)
  assert np.abs(image - expected).max() <= (0 if kind == 'PNG' else 12)
  assert np.abs(image - expected).mean() < 2


def test_grey_images_get_three_channels(kind, random_crop):
  encoded = encode(ramp(40, 60)[..., 0], kind)
  for image in (center_crop(encoded, 16), random_crop(encoded, (0, 0))):
    assert image.shape == (16, 16, 3)
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_transparent_pixels_are_composited_on_white():
  ink = np.tile(np.repeat(np.array([0, 100, 255], np.uint8), 32), (96, 1))
  black = Image.new('L', (96, 96))
  content = io.BytesIO()
  Image.merge('RGBA', (black, black, black, Image.fromarray(ink))).save(content, 'PNG')
  image = center_crop(content.getvalue(), 84)  # 7/8 of 96 pixels: nothing is resized.
  np.testing.assert_array_equal(image, np.stack([255 - ink[6:90, 6:90]] * 3, axis=-1))
