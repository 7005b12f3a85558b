"""Image files: finding them, reading them, and errors."""

import contextlib
import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from imta_jax.data import preprocess
from imta_jax.data.image_files import (
  ImageError,
  decode_rgb,
  find_images,
  image_size_and_channels,
  random_crop,
  read_image,
)
from imta_jax.errors import UsageError

# Pillow warns about corrupt and about huge images.
pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::RuntimeWarning')
RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (6, 5), np.uint8)
COLOUR = RANDOM.integers(0, 256, (6, 5, 3), np.uint8)
SMOOTH = np.add.outer(np.arange(90), 2 * np.arange(70)).astype(np.uint8) // 2


def encoded(pixels, format='PNG', **options):
  image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
  content = io.BytesIO()
  image.save(content, format, **options)
  return content.getvalue()


def read(content, shape=(6, 5, 1), crop='none', **options):
  return read_image(io.BytesIO(content), shape, crop, **options)


def png_of_size(width, height):
  """Returns a PNG with a size in its header, but without pixels."""
  parts = (b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0), b'IDAT')
  chunks = (struct.pack('>I', len(p) - 4) + p + struct.pack('>I', zlib.crc32(p)) for p in parts)
  return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


@pytest.mark.parametrize('format', ['BMP', 'GIF', 'PNG', 'PPM', 'TIFF'])
def test_pixels_are_those_of_the_file(format):
  image = read(encoded(GREY, format))
  assert (image.shape, image.dtype) == ((6, 5, 1), np.uint8)
  np.testing.assert_array_equal(image[..., 0], GREY)


@pytest.mark.parametrize('format', ['JPEG', 'WEBP'])
def test_lossy_formats_are_read(format):
  image = read(encoded(SMOOTH, format, quality=95), (90, 70, 1))
  np.testing.assert_allclose(image[..., 0], SMOOTH.astype(float), atol=20)


def test_channels_are_the_networks():
  np.testing.assert_array_equal(read(encoded(COLOUR), (6, 5, 3)), COLOUR)
  np.testing.assert_array_equal(read(encoded(GREY), (6, 5, 3)), np.stack([GREY] * 3, axis=-1))
  luma = COLOUR @ [0.299, 0.587, 0.114]
  np.testing.assert_allclose(read(encoded(COLOUR))[..., 0], luma, atol=1)


@pytest.mark.parametrize('mode', ['1', 'LA', 'P', 'RGBA', 'CMYK'])
def test_any_mode_becomes_the_networks(mode):
  format = 'TIFF' if mode == 'CMYK' else 'PNG'
  black_and_white = np.where(np.indices((6, 5)).sum(0) % 2, 255, 0).astype(np.uint8)
  content = encoded(Image.fromarray(black_and_white).convert(mode), format)
  for channels in (1, 3):
    expected = np.stack([black_and_white] * channels, axis=-1)
    np.testing.assert_array_equal(read(content, (6, 5, channels)), expected)


SIXTEEN_BITS = np.arange(30, dtype=np.uint16).reshape(6, 5) * 2_259
PORTABLE_GREYMAPS = {
  '16 bits': b'P5 5 6 65535\n' + SIXTEEN_BITS.astype('>u2').tobytes(),
  '12 bits': b'P5 5 6 4095\n' + (SIXTEEN_BITS // 16).astype('>u2').tobytes(),
  'text': b'P2 5 6 65535\n' + ' '.join(map(str, SIXTEEN_BITS.ravel())).encode(),
}


@pytest.mark.parametrize(
  'content',
  [
    pytest.param(encoded(SIXTEEN_BITS), id='PNG'),
    pytest.param(encoded(SIXTEEN_BITS.astype('<u2'), 'TIFF'), id='little-endian TIFF'),
    pytest.param(encoded(SIXTEEN_BITS.astype('>u2'), 'TIFF'), id='big-endian TIFF'),
    *(pytest.param(content, id=f'PGM, {name}') for name, content in PORTABLE_GREYMAPS.items()),
  ],
)
def test_sixteen_bits_are_scaled_to_eight(content):
  np.testing.assert_allclose(read(content)[..., 0], SIXTEEN_BITS / 257, atol=0.6)
  crop = random_crop(decode_rgb(io.BytesIO(content), 8), 8, 0.08, False, np.random.default_rng(0))
  assert 0 < crop.mean() < 255 and crop.std() > 20


# Black with an opacity, as ink, that looks like GREY on white; and the same with palettes.
INK = Image.fromarray(255 - GREY)
BLACK = Image.new('L', INK.size)
PALETTE = Image.frombytes('P', INK.size, INK.tobytes())
PALETTE.putpalette(bytes(768))
TRANSPARENT = {
  'LA': encoded(Image.merge('LA', (BLACK, INK))),
  'RGBA': encoded(Image.merge('RGBA', (BLACK, BLACK, BLACK, INK))),
  'RGBA TIFF': encoded(Image.merge('RGBA', (BLACK, BLACK, BLACK, INK)), 'TIFF'),
  'RGBA WebP': encoded(Image.merge('RGBA', (BLACK, BLACK, BLACK, INK)), 'WEBP', lossless=True),
  'palette': encoded(PALETTE, transparency=bytes(range(256))),
}


@pytest.mark.parametrize('content', TRANSPARENT.values(), ids=TRANSPARENT)
@pytest.mark.parametrize('channels', [1, 3])
def test_transparent_images_are_composited_on_white(content, channels):
  image = read(content, (6, 5, channels))
  np.testing.assert_allclose(image, np.stack([GREY] * channels, axis=-1), atol=1)
  crop = random_crop(decode_rgb(io.BytesIO(content), 8), 8, 0.08, False, np.random.default_rng(0))
  assert crop.std() > 20


@pytest.mark.parametrize(
  ('format', 'mode', 'level'), [('PNG', 'L', 0), ('PNG', 'RGB', (0, 0, 0)), ('GIF', 'P', 0)]
)
def test_a_transparent_level_is_white(format, mode, level):
  pixels = np.where(GREY < 128, 0, 200).astype(np.uint8)
  content = encoded(Image.fromarray(pixels).convert(mode), format, transparency=level)
  np.testing.assert_array_equal(read(content)[..., 0], np.where(GREY < 128, 255, 200))


def test_images_are_turned_upright():
  exif = Image.Exif()
  exif[0x0112] = 6  # The camera was turned: the picture is to be turned clockwise.
  content = encoded(GREY, exif=exif)
  np.testing.assert_array_equal(read(content, (5, 6, 1))[..., 0], np.rot90(GREY, -1))


def test_without_a_crop_all_is_resized():
  image = read(encoded(SMOOTH), (45, 35, 1))
  means = SMOOTH.reshape(45, 2, 35, 2).mean(axis=(1, 3))
  np.testing.assert_allclose(image[2:-2, 2:-2, 0], means[2:-2, 2:-2], atol=2)


@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
@pytest.mark.parametrize('shape', [(90, 70), (300, 257)])
def test_the_central_crop_is_that_of_evaluation(shape, format):
  coarse = np.random.default_rng(1).integers(0, 256, (9, 9, 3), np.uint8)
  pixels = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
  options = {} if format == 'PNG' else {'quality': 80, 'subsampling': 0}
  content = encoded(pixels, format, **options)
  for size in (24, 64):
    expected = preprocess.decode_center_crop(content, size).numpy()
    difference = read(content, (size, size, 3), 'center').astype(int) - expected
    assert np.abs(difference).max() <= 1


CORRUPT = {
  'empty': (b'', 'not an image'),
  'text': (b'not an image at all', 'not an image'),
  'half a PNG': (encoded(COLOUR)[:60], 'cannot be read'),
  'half a JPEG': (encoded(SMOOTH, 'JPEG')[:-300], 'cannot be read'),
  'broken PNG': (encoded(COLOUR).replace(b'IDAT', b'IDXX'), 'not an image'),
  'another format': (encoded(GREY, 'ICO'), 'not an image'),
  'pixels missing': (png_of_size(20, 30), 'cannot be read'),
}


@pytest.mark.parametrize('name', CORRUPT)
def test_corrupt_images_are_refused(name):
  content, reason = CORRUPT[name]
  with pytest.raises(ImageError, match=reason) as caught:
    read(content)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('size', [(8192, 8193), (100_000, 100_000)])
def test_huge_images_are_refused_by_their_header(size):
  with pytest.raises(ImageError, match='too large|exceeds limit'):
    read(png_of_size(*size))


def chunk(kind, content):
  parts = (struct.pack('>I', len(content)), kind + content)
  return b''.join(parts) + struct.pack('>I', zlib.crc32(kind + content))


BOMB = zlib.compress(bytes(300_000_000), 9)
PIXELS = chunk(b'IDAT', zlib.compress((b'\0' + bytes([5]) * 24) * 8))


def png(*chunks):
  """Returns a PNG of 8 x 8 pixels with chunks after the header."""
  header = chunk(b'IHDR', struct.pack('>IIBBBBB', 8, 8, 8, 2, 0, 0, 0))
  return b'\x89PNG\r\n\x1a\n' + header + b''.join(chunks) + chunk(b'IEND', b'')


@contextlib.contextmanager
def memory_limited(num_bytes):
  """Lets this process allocate only so much more."""
  with open('/proc/self/statm') as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
  limits = resource.getrlimit(resource.RLIMIT_AS)
  resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)


BOMBS = {
  'text': png(chunk(b'zTXt', b'c\0\0' + BOMB), PIXELS),
  'colour_profile': png(chunk(b'iCCP', b'c\0\0' + BOMB), PIXELS),
}


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs Linux')
@pytest.mark.parametrize('bomb', BOMBS)
def test_compressed_bombs_are_refused_in_little_memory(bomb):
  with memory_limited(100_000_000), pytest.raises(ImageError, match='Decompressed data too large'):
    read(BOMBS[bomb], (8, 8, 3))


@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='needs Linux')
def test_of_many_frames_only_the_first_is_decoded():
  """The others, 1,000 of 4 million pixels, would take minutes and gigabytes."""
  one = encoded(Image.new('P', (2_000, 2_000), 7), 'GIF')
  frame = one[one.index(b',', 13) : -1]
  with memory_limited(100_000_000):
    start = time.process_time()
    image = read(one[:-1] + 1_000 * frame + b';', (8, 8, 1))
    assert time.process_time() - start < 5
  np.testing.assert_array_equal(image, read(one, (8, 8, 1)))


@pytest.mark.parametrize('format', ['GIF', 'JPEG', 'PNG', 'TIFF'])
def test_images_cut_anywhere_are_refused_or_whole(format):
  content = encoded(SMOOTH, format)
  whole = read(content, (90, 70, 1))
  for length in np.linspace(0, len(content) - 1, 40).astype(int):
    with contextlib.suppress(ImageError):
      np.testing.assert_array_equal(read(content[:length], (90, 70, 1)), whole)


def test_the_limit_of_pixels_can_be_chosen():
  assert read(encoded(GREY), max_pixels=30).any()
  with pytest.raises(ImageError, match='5 x 6 exceeds 29 pixels'):
    read(encoded(GREY), max_pixels=29)


def test_files_that_are_not_there_are_refused(tmp_path):
  for path, reason in ((tmp_path / 'no.png', 'No such file'), (tmp_path, 'not a regular')):
    with pytest.raises(ImageError, match=reason):
      read_image(str(path), (6, 5, 1), 'none')


@pytest.mark.parametrize(
  ('value', 'kind'),
  [
    (np.float32(0.5), 'floating-point numbers'),
    (np.int32(200), '32-bit integers'),
  ],
)
def test_pixels_without_a_known_white_are_refused_by_their_header(value, kind):
  content = encoded(np.full((8, 8), value), 'TIFF')
  with pytest.raises(ImageError, match=f'pixels are {kind}: save it with 8 or 16 bits'):
    read(content, (8, 8, 1))
  with pytest.raises(ImageError, match=f'pixels are {kind}'):
    image_size_and_channels(io.BytesIO(content))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'x.png')
  with pytest.raises(ImageError, match='not a regular file'):
    read_image(str(tmp_path / 'x.png'), (8, 8, 1), 'none')


def test_linked_folders_are_searched_once(tmp_path):
  for name in ('own', 'elsewhere', 'elsewhere/deep'):
    (tmp_path / name).mkdir()
    (tmp_path / name / '1.png').touch()
  for name in ('a', 'b'):  # The second one leads to the same images.
    (tmp_path / 'own' / name).symlink_to(tmp_path / 'elsewhere')
  (tmp_path / 'elsewhere/deep/back').symlink_to(tmp_path / 'own')
  found = [os.path.relpath(path, tmp_path) for path in find_images([str(tmp_path / 'own')])]
  assert found == ['own/1.png', 'own/a/1.png', 'own/a/deep/1.png']


def test_hidden_and_system_files_are_left_out_unless_named(tmp_path):
  hidden = ('.ipynb_checkpoints/1.png', '@eaDir/1.png', 'a/__MACOSX/1.png', 'a/._1.png')
  for name in (*hidden, 'a/1.png'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  named = str(tmp_path / 'a/._1.png')
  found = find_images([str(tmp_path), str(tmp_path / '.ipynb_checkpoints'), named])
  names = [os.path.relpath(path, tmp_path) for path in found]
  assert names == ['a/1.png', '.ipynb_checkpoints/1.png', 'a/._1.png']


def test_links_in_a_circle_are_left_and_refused(tmp_path):
  (tmp_path / 'a').mkdir()
  (tmp_path / 'a/1.png').write_bytes(encoded(GREY))
  (tmp_path / 'a/up').symlink_to(tmp_path)
  (tmp_path / 'a/2.png').symlink_to(tmp_path / 'a/2.png')
  one, circle = find_images([str(tmp_path)])
  assert read_image(one, (6, 5, 1), 'none').any()
  with pytest.raises(ImageError, match='Too many levels of symbolic links'):
    read_image(circle, (6, 5, 1), 'none')


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
  def walk(top, onerror, **_):
    onerror(PermissionError(13, 'Permission denied', f'{top}/locked'))
    yield top, [], ['a.png']

  monkeypatch.setattr(os, 'walk', walk)
  with pytest.raises(UsageError, match='locked cannot be read: Permission denied'):
    list(find_images([str(tmp_path)]))


@pytest.mark.parametrize(
  ('shape', 'crop', 'expected'), [((6, 5, 1), 'middle', "'middle'"), ((6, 5, 2), 'none', '2 chan')]
)
def test_what_no_network_reads_is_refused(shape, crop, expected):
  with pytest.raises(ValueError, match=expected) as caught:
    read(encoded(GREY), shape, crop)
  assert not isinstance(caught.value, ImageError)


def test_folders_are_searched_by_extension_in_order(tmp_path):
  for name in ('b/2.PNG', 'b/1.jpg', 'b/c/3.webp', 'a.png', 'b/notes.txt', 'b/a/0.tif'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  found = find_images([str(tmp_path / 'b'), 'odd.xyz', str(tmp_path / 'a.png'), str(tmp_path)])
  of_folder = ['b/1.jpg', 'b/2.PNG', 'b/a/0.tif', 'b/c/3.webp']
  names = [path.removeprefix(f'{tmp_path}/') for path in found]
  assert names == [*of_folder, 'odd.xyz', 'a.png', 'a.png', *of_folder]


@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
def test_large_images_are_shrunk_and_small_ones_kept(format):
  columns = np.linspace(0, 255, 400)
  pixels = np.broadcast_to(columns[np.newaxis, :, np.newaxis], (300, 400, 3)).astype(np.uint8)
  file = io.BytesIO(encoded(pixels, format))
  assert decode_rgb(file, 300).size == decode_rgb(file, 1_000).size == (400, 300)
  image = decode_rgb(file, 90)
  assert image.size == (120, 90)
  expected = np.linspace(0, 255, 120)
  np.testing.assert_allclose(np.asarray(image)[45, :, 0], expected, atol=3)
