"""Starting from a trained network: an export, a workdir, weights, and what does not fit."""

import functools
import json

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from safetensors import numpy as safetensors

from imta_jax import config as config_lib
from imta_jax import models
from imta_jax.adaptive import exported
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError
from imta_jax.interop.torch import to_state_dict
from imta_jax.models.folding import fold_batch_norm, unfold_batch_norm
from imta_jax.models.initial_values import initialize
from imta_jax.training import phases, restore, train_state
from imta_jax.training import workdir as layout
from imta_jax.training.checkpoint import Checkpoints
from imta_jax.training.phases import Phase

SHAPE = (8, 8, 3)
FIELDS = {
  'num_exits': 2,
  'step_mode': 'even',
  'channels': 4,
  'growth_rate': 4,
  'scale_factors': (1,),
  'bottleneck_factors': (1,),
}


def create(num_classes, **fields):
  return models.create('msdnet', **(FIELDS | fields), num_classes=num_classes)


@pytest.fixture(scope='module')
def donor(random_variables):
  """Variables that a network keeps when it is exported, in which batch norm only adds."""
  variables = random_variables(create(5), SHAPE)
  return unfold_batch_norm(fold_batch_norm(variables), variables)


@pytest.fixture(scope='module')
def export(donor, tmp_path_factory):
  folder = tmp_path_factory.mktemp('pretrained') / 'export'
  classifier = AdaptiveClassifier.from_model(
    create(5),
    donor,
    (0.5, -np.inf),
    SHAPE,
    mean=(0.5,) * 3,
    std=(0.2,) * 3,
    class_names=list('abcde'),
    preprocessing={'crop': 'none'},
  )
  classifier.save(folder)
  return folder


@pytest.fixture(scope='module')
def workdir(donor, tmp_path_factory):
  """A run whose phase II has the donor's variables as its best state."""
  workdir = epath.Path(tmp_path_factory.mktemp('pretrained')) / 'run'
  config = config_lib.default()
  config.dataset.image_size = SHAPE[0]
  config.model.update(name='msdnet', **FIELDS)
  config.phases[1].collaboration = 'off'
  layout.claim(config, workdir, list('abcde'))
  others = jax.tree.map(np.zeros_like, donor)
  for index, (phase, best) in enumerate(zip(config.phases, (others, donor), strict=True)):
    optimizer = train_state.create_optimizer(phase, lambda step: 0.1)
    with Checkpoints(layout.checkpoint_folder(workdir, layout.phase_name(index))) as checkpoints:
      for step, variables in enumerate((best, others), start=1):
        state = train_state.create_state(variables, phase, optimizer)
        checkpoints.save(step, state, 1 / step)
  return workdir


@pytest.mark.parametrize('source', ['export', 'workdir'])
def test_all_but_the_last_layers_start_from_a_network_of_other_classes(source, donor, request):
  folder = str(request.getfixturevalue(source))
  fresh = initialize(create(3), 0, SHAPE)
  started, loaded = phases.start_from(restore.load_variables(folder, create(3), SHAPE), fresh)
  started = flatten_dict(started, sep='/')
  donor, fresh = flatten_dict(donor, sep='/'), flatten_dict(fresh, sep='/')
  assert started.keys() == fresh.keys()
  for name, leaf in started.items():
    expected = fresh if name.startswith('params/classifiers_') else donor
    np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
  assert loaded == (
    f'loaded {len(fresh) - 4} of {len(fresh)} arrays; new: '
    'classifiers_0 to classifiers_1 (3 classes); unused: 0 of the trained network'
  )


@pytest.mark.parametrize('num_exits', [1, 2, 3])
def test_classifiers_start_from_the_embedding_rows_of_a_network_with_isc(
  num_exits, random_variables
):
  donor = random_variables(create(5, collaboration='network'), SHAPE)
  fresh = initialize(create(5, num_exits=num_exits), 0, SHAPE)
  started, loaded = phases.start_from(donor, fresh)
  for index in range(min(num_exits, 2)):
    dense, donors = (v['params'][f'classifiers_{index}']['dense'] for v in (started, donor))
    np.testing.assert_array_equal(dense['kernel'], donors['kernel'][:128])
    np.testing.assert_array_equal(dense['bias'], donors['bias'])
  count = len(flatten_dict(fresh))
  if num_exits == 2:
    # ISC has a dense layer and batch norm of two arrays each, and two running statistics.
    assert loaded.startswith(f'loaded {count} of {count} arrays; new: none; unused: 6 of')
  elif num_exits == 3:
    assert 'new: stages_2, exits_2, classifiers_2 (5 classes); ' in loaded


def test_embeddings_of_another_size_leave_classifiers_new(random_variables):
  # Images twice as large have embeddings four times as large.
  donor = random_variables(create(5), (16, 16, 3))
  small, large = (initialize(create(5), 0, (side, side, 3)) for side in (16, 32))
  assert len(large['params']['classifiers_0']['dense']['kernel']) > 128
  assert 'new: none' in phases.start_from(donor, small)[1]
  started, loaded = phases.start_from(donor, large)
  assert 'new: 1 of 2 arrays of classifiers_0, 1 of 2 arrays of classifiers_1 (5 clas' in loaded
  np.testing.assert_array_equal(
    *(tree['params']['classifiers_0']['dense']['kernel'] for tree in (started, large))
  )


def test_phase_one_starts_from_the_network_that_the_config_names(export, donor):
  config = config_lib.default()
  config.model.update(name='msdnet', **FIELDS)
  load = functools.partial(restore.load_variables, str(export))
  phase = Phase(
    config, 0, None, load, num_classes=3, image_shape=SHAPE, steps_per_epoch=config.batch_size
  )
  assert phase.loaded.startswith('loaded ')
  started = flatten_dict(phase.state.weights.variables, sep='/')
  for name, leaf in flatten_dict(donor, sep='/').items():
    if not name.startswith('params/classifiers_'):
      np.testing.assert_array_equal(started[name], leaf, err_msg=name)


def test_phase_one_starts_from_pretrained_weights(random_variables, tmp_path):
  config = config_lib.default()
  config.model.update(name='msdnet', **FIELDS)
  model = create(5)
  state = to_state_dict(random_variables(model, (32, 32, 3)), model)
  state = {name: np.ascontiguousarray(value) for name, value in state.items()}
  safetensors.save_file(state, tmp_path / 'weights.safetensors')
  load = functools.partial(restore.load_variables, str(tmp_path / 'weights.safetensors'))
  phase = Phase(config, 0, None, load, num_classes=5, image_shape=(32, 32, 3), steps_per_epoch=1)
  assert 'new: none; unused: 0 of' in phase.loaded
  started = to_state_dict(phase.state.weights.variables, phase.model)
  for name, value in state.items():
    np.testing.assert_array_equal(started[name], value, err_msg=name)


def test_layers_of_another_width_keep_their_initial_values(export, donor):
  fresh = initialize(create(5, growth_rate=8), 0, SHAPE)
  started, _ = phases.start_from(restore.load_variables(str(export), create(3), SHAPE), fresh)
  (stem,) = (name for name in fresh['params']['stages_0'] if name.endswith('_0'))
  np.testing.assert_array_equal(
    flatten_dict(started['params']['stages_0'][stem])[('scale_0', 'conv', 'kernel')],
    flatten_dict(donor['params']['stages_0'][stem])[('scale_0', 'conv', 'kernel')],
  )
  shapes = [
    {name: np.shape(leaf) for name, leaf in flatten_dict(tree).items()} for tree in (started, fresh)
  ]
  assert shapes[0] == shapes[1]


def test_a_network_with_nothing_in_common_is_refused(export):
  model = models.create('resnet', depth=8, num_classes=3)
  with pytest.raises(UsageError, match='has no layer in common with this one'):
    phases.start_from(
      restore.load_variables(str(export), create(3), SHAPE), initialize(model, 0, SHAPE)
    )


def test_a_folder_that_is_neither_is_refused(tmp_path):
  with pytest.raises(UsageError, match='is not a workdir: it has no config.json'):
    restore.load_variables(str(tmp_path), create(3), SHAPE)


def test_an_export_without_names_is_refused(export, tmp_path, monkeypatch):
  (tmp_path / 'manifest.json').write_text('{}')
  manifest, _, weights, *_ = exported.read_export(export)
  manifest.pop('variables')
  monkeypatch.setattr(exported, 'read_export', lambda folder: (manifest, [], weights, None, []))
  with pytest.raises(UsageError, match='does not name all of its variables: export it again'):
    restore.load_variables(str(tmp_path), create(3), SHAPE)


def test_a_corrupt_export_is_refused(tmp_path):
  (tmp_path / 'manifest.json').write_text(json.dumps({'format': 1}))
  with pytest.raises(UsageError, match='is corrupt: export again'):
    restore.load_variables(str(tmp_path), create(3), SHAPE)
