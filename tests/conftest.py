"""What several tests need."""

from pathlib import Path

import jax
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier, CalibrationSet, OperatingPoint
from imta_jax.models.initial_values import initialize

# Tests compile much and run little. Programs that they start share the cache of compiled programs.
_COMPILED = Path(__file__).parents[1] / '.pytest_cache/compiled'
# Of the images of `make_classifier`.
_SHAPE = (16, 16, 3)
jax.config.update('jax_disable_most_optimizations', True)
jax.config.update('jax_compilation_cache_dir', str(_COMPILED))
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


def pytest_collection_modifyitems(items):
  """Puts the files that take longest first, beside which the others run."""
  longest = ('test_hosts.py', 'test_readme.py', 'test_wheel.py', 'test_loop.py')
  items.sort(key=lambda item: [item.path.name != name for name in longest])


@pytest.fixture(scope='session', autouse=True)
def cache(tmp_path_factory):
  """Keeps what the package stores between runs out of the user's folders."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('cache')))
    patch.setenv('JAX_COMPILATION_CACHE_DIR', str(_COMPILED))
    patch.setenv('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
    yield


@pytest.fixture(scope='session')
def tiny_msdnet():
  """A function that creates an MSDNet of two exits and one scale, with further fields."""

  def create(**fields):
    return models.create(
      'msdnet',
      num_exits=2,
      step_mode='even',
      channels=4,
      growth_rate=4,
      scale_factors=(1,),
      bottleneck_factors=(1,),
      **fields,
    )

  return create


@pytest.fixture(scope='session')
def random_variables():
  """A function that gives a network variables of which none is special, as initial zeros are."""

  def draw(model, image_shape, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
      lambda leaf: leaf + random.uniform(-0.2, 0.2, leaf.shape).astype(np.float32),
      initialize(model, seed, image_shape),
    )

  return draw


@pytest.fixture(scope='session')
def tiny_classifier():
  """A network of two dense layers, which is quick to compile."""

  def first(weights, images):
    features = images.reshape(images.shape[0], 4) / 255
    return features, features @ weights['kernel']

  def second(weights, carry):
    features, logits = carry
    return (), features @ weights['kernel'] + logits + weights['bias']

  random = np.random.default_rng(0)
  kernels = random.standard_normal((2, 4, 3)).astype(np.float32)
  return AdaptiveClassifier(
    [first, second],
    [{'kernel': kernels[0]}, {'bias': np.ones(3, np.float32), 'kernel': kernels[1]}],
    (0.5, -np.inf),
    jax.ShapeDtypeStruct((2, 2, 1), np.uint8),
    madds=(12, 24),
    operating_points=[OperatingPoint((0.5, -np.inf), (0.5, 0.5), 0.9)],
    validation=CalibrationSet(random.random((2, 40), np.float32), random.random((2, 40)) < 0.9),
    class_names='abc',
    preprocessing={'crop': 'none'},
  )


@pytest.fixture(scope='session')
def tiny_export(tiny_classifier, tmp_path_factory):
  """An export, without engine, of the tiny classifier."""
  folder = tmp_path_factory.mktemp('tiny') / 'exported'
  tiny_classifier.save(folder, without_engine=True)
  return folder


@pytest.fixture(scope='session')
def images():
  return np.random.default_rng(0).integers(0, 256, (7, *_SHAPE), dtype=np.uint8)


@pytest.fixture(scope='session')
def make_classifier(tiny_msdnet, random_variables, images):
  """A function that makes a classifier of two exits, at each of which some images leave."""

  def make(collaboration):
    model = tiny_msdnet(num_classes=5, collaboration=collaboration)
    classifier = AdaptiveClassifier.from_model(
      model,
      random_variables(model, _SHAPE),
      (0.0, -np.inf),
      _SHAPE,
      mean=(0.5, 0.4, 0.3),
      std=(0.2, 0.3, 0.2),
      operating_points=[OperatingPoint((0.9, np.inf), (0.5, 0.5), 0.7)],
      madds=(10, 20),
      class_names=list('abcde'),
      preprocessing={'crop': 'none'},
    )
    # Between two confidences of the first exit, so that rounding sends no image elsewhere.
    between = np.sort(classifier.predict(images).confidences)[3:5].mean()
    classifier.thresholds = np.array([between, -np.inf], np.float32)
    return classifier

  return make


@pytest.fixture(scope='session')
def classifier(make_classifier):
  return make_classifier('network')


@pytest.fixture(scope='session')
def tfds():
  import tensorflow_datasets  # Slow to import, so only where it is needed.

  return tensorflow_datasets


@pytest.fixture(scope='session')
def prepare_numbered(tfds):
  """A function that prepares a data set in several files; the label of an image is its number.

  It takes the name, the folder of TFDS, the arguments of the image's feature, {split: number of
  images}, a function that gives the image of a number, and the number of files per split.
  """

  def prepare(dataset_name, folder, feature, counts, draw, num_files):
    class Numbered(tfds.core.GeneratorBasedBuilder):
      VERSION = tfds.core.Version('1.0.0')
      name = dataset_name

      def _info(self):
        features = {
          'image': tfds.features.Image(**feature),
          'label': tfds.features.ClassLabel(num_classes=64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

      def _split_generators(self, download_manager):
        del download_manager
        return {split: self._generate_examples(count) for split, count in counts.items()}

      def _generate_examples(self, count):
        for number in range(count):
          yield number, {'image': draw(number), 'label': number}

    options = tfds.download.DownloadConfig(num_shards=num_files)
    Numbered(data_dir=str(folder)).download_and_prepare(download_config=options)

  return prepare
