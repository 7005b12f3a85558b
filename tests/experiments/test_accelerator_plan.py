"""Plans: what is counted of a program, the largest batch, and plans of a small network."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plan
import pytest
from planning import counts, targets

from imta_jax import config as config_lib
from imta_jax.errors import UsageError

targets.prepare_environment()  # Before JAX is used.
ROOT = Path(__file__).parents[2]
# As compilers print it: a TPU's layouts, a loop of 5 rounds, an all-reduce, a prefetch.
PROGRAM = """
HloModule jit_step, is_scheduled=true

%fused (p.0: f32[4,8]) -> f32[4,8] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  ROOT %neg = f32[4,8]{1,0} negate(%p.0)
}

%body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p.1), index=1
  %y = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %t = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

ENTRY %main (a: f32[4,8], b: bf16[3,5]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[3,5]{1,0:T(8,128)(2,1)} parameter(1)
  %start = (bf16[3,5]{1,0:T(8,128)(2,1)S(1)}, bf16[3,5]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%b)
  %done = bf16[3,5]{1,0:T(8,128)(2,1)S(1)} copy-done(%start)
  %n = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%n, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[4,8]{1,0} all-reduce(%out), replica_groups={{0,1}}, to_apply=%add
}
"""  # noqa: E501


def test_a_program_is_counted_as_its_device_runs_it():
  counted = counts.count_hlo(PROGRAM)
  array = 4 * 8 * 4
  assert counted['launches'] == 1 + 5 + 1  # The prefetch, the fusion in each round, the all-reduce.
  assert counted['bytes'] == 2 * (3 * 5 * 2) + 5 * 2 * array + 2 * array
  assert (counted['collectives'], counted['collective_bytes']) == (1, array)


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [
    ('f32[]', 4),
    ('pred[3,2]{1,0}', 6),
    ('bf16[7]{0:T(256)}', 14),
    ('f32[32,56,56,16]{3,0,2,1:T(8,128)}', 6_422_528),
    ('f8e4m3fn[2,2]{1,0}', 4),
    ('s4[4]{0}', 2),
    ('(f32[8,128]{1,0:T(8,128)S(1)}, token[])', 4096),
  ],
)
def test_bytes_of_arrays(shape, expected):
  text = f'ENTRY %main (a: f32[]) -> f32[] {{\n  ROOT %x = {shape} custom-call()\n}}\n'
  assert counts.count_hlo(text)['bytes'] == expected


SLICED = """
%unpack (p.0: f32[1000], p.1: f32[10]) -> f32[10] {
  %p.0 = f32[1000]{0} parameter(0)
  %p.1 = f32[10]{0} parameter(1)
  %view = f32[1000,1]{1,0} bitcast(%p.0)
  %part = f32[10,1]{1,0} slice(%view), slice={[20:30], [0:1]}
  %flat = f32[10]{0} bitcast(%part)
  ROOT %sum = f32[10]{0} add(%flat, %p.1)
}

ENTRY %main (a: f32[1000], b: f32[10]) -> f32[10] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %c = f32[10]{0} fusion(%a, %b), kind=kLoop, calls=%unpack
  ROOT %d = f32[5]{0} slice(%c), slice={[0:5]}
}
"""


def test_of_what_is_sliced_the_slices_count():
  counted = counts.count_hlo(SLICED)
  assert counted['launches'] == 2
  assert counted['bytes'] == 4 * ((10 + 10 + 10) + (5 + 5))


def test_a_training_loop_is_counted_by_the_round():
  def loop(x, count):
    return jax.lax.fori_loop(0, count, lambda _, x: jnp.cos(jnp.sin(x @ x) @ x), jnp.tanh(x) @ x)

  x, count = jax.ShapeDtypeStruct((64, 64), np.float32), jax.ShapeDtypeStruct((), np.int32)
  counted = counts.count_hlo(jax.jit(loop).lower(x, count).compile().as_text())
  array = 64 * 64 * 4
  assert 4 <= counted['launches'] <= 7
  assert 9 * array <= counted['bytes'] < 11 * array  # Two products and two functions.
  assert counted['collectives'] == 0


def test_graphs_and_launches_outside_of_them():
  text = """
000: kCommandBuffer [source | next=004 (1)]
    001: kCustomKernel [source | next=002 (1)] fusion_1 grid: [5, 1, 1] threads: [128, 1, 1]
    002: kCustomKernel [prev=001 (1) | sink] fusion_2 grid: [5, 1, 1] threads: [128, 1, 1]
003: kConvolution [prev=000 (1) | sink] kConvolution
004: kAllReduceStart [x]
005: kAllReduceDone [x]
006: kWhile [x]
    007: kCustomKernel [x] fusion_3
"""
  launches = text.replace('kWhile', 'kConditional')
  assert counts.count_thunks(launches) == (1, 3)
  # Of a training loop, its rounds count.
  assert counts.count_thunks(text + '008: kCopy [x]') == (0, 1)


def test_every_gpu_has_a_configuration():
  for kind, gpu in targets.GPUS.items():
    text = targets.gpu_config(kind)
    assert f'core_count: {gpu.cores} ' in text and f'device_memory_size: {gpu.memory}\n' in text
    assert text.count('{') == text.count('}')


@pytest.mark.parametrize('name', ['v3:2x2', 'cpu:2'])
def test_unknown_targets_are_refused(name):
  with pytest.raises(UsageError, match=f'{name} is unknown: choose one of v4, .*, h100, .* cpu'):
    targets.open_target(name)


SMALL = f"""
from imta_jax import config
def get_config(argument):
  small = config.load('{ROOT}/configs/mnist5k.py:exits=2')
  small.model.update(scale_factors=(1,), bottleneck_factors=(1,))
  return small
"""


def has(module):
  return importlib.util.find_spec(module) is not None


NO_TPU = pytest.mark.skipif(not has('libtpu'), reason='the compiler for TPUs is not installed')
NO_GPU = pytest.mark.skipif(
  not has('jax_cuda13_plugin') and not has('jax_cuda12_plugin'),
  reason='the compiler for GPUs is not installed',
)


@pytest.mark.parametrize(
  ('name', 'num_devices'),
  [
    pytest.param('cpu', 1, marks=pytest.mark.slow),
    pytest.param('v5e:1x1', 1, marks=NO_TPU),
    pytest.param('v5p:2x2x1', 4, marks=NO_TPU),
    pytest.param('h100', 1, marks=NO_GPU),
    pytest.param('a100:2', 2, marks=NO_GPU),
  ],
)
def test_a_small_network_is_planned(name, num_devices, tmp_path, capsys):
  (tmp_path / 'small.py').write_text(SMALL)
  plan.main(
    [
      f'--config={tmp_path}/small.py',
      f'--target={name}',
      '--batch_sizes=16',
      '--cuda_graphs=whole',
      f'--output={tmp_path}/plan.json',
    ]
  )
  records = json.loads((tmp_path / 'plan.json').read_text())
  assert [(r['phase'], r['batch_size'], r['target']) for r in records] == [
    (1, 16, name),
    (2, 16, name),
  ]
  for record in records:
    assert record['devices'] == num_devices
    assert record['fits'] and record['launches'] > 20
    assert record['operations'] > 0 and record['bytes'] > 0
    assert record['peak_bytes'] >= record['argument_bytes'] > 1e5
    assert (record['collectives'] > 0) == (num_devices > 1)
    # Of a single GPU all but the condition of the loop; of several, XLA leaves convolutions out.
    graphs = (record['graphs'], record['launches_outside'])
    assert graphs == (1, 1) if name == 'h100' else (graphs[0] is None) == (name[0] != 'a')
  first, second = records
  assert first['operations'] > second['operations']  # Phase II trains the last layers alone.
  assert f'| {first["launches"]} ' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    pytest.param('mnist5k_h100', marks=NO_GPU),
    pytest.param('cifar100_exits-5_h100', marks=NO_GPU),
    pytest.param('cifar100_h100', marks=NO_GPU),
    pytest.param('imagenet_h100', marks=NO_GPU),
    pytest.param('mnist5k_v5e-2x4', marks=NO_TPU),
    pytest.param('cifar100_exits-5_v5e-2x4', marks=NO_TPU),
  ],
)
def test_programs_are_those_of_the_committed_plans(name, tmp_path):
  records = json.loads((ROOT / f'experiments/results/plans/{name}.json').read_text())
  fields = ('config', 'target', 'dtype', 'cuda_graphs')
  options = [f'--{field}={records[0][field]}' for field in fields]
  options += [f'--batch_sizes={records[0]["batch_size"]}', f'--output={tmp_path}/plan.json']
  # In a program of its own, whose compilers optimize.
  subprocess.run([sys.executable, 'experiments/plan.py', *options], cwd=ROOT, check=True)
  for found, record in zip(json.loads((tmp_path / 'plan.json').read_text()), records, strict=True):
    if found['versions'] != record['versions']:
      pytest.skip(f'recorded with {record["versions"]}')
    assert found == {
      field: pytest.approx(value, rel=0.02) if field.endswith(('bytes', 'launches')) else value
      for field, value in record.items()
    }


def test_targets_without_a_compiler_say_how_to_get_it(monkeypatch):
  def missing(package):
    raise targets.importlib.metadata.PackageNotFoundError(package)

  monkeypatch.setattr(targets.importlib.metadata, 'version', missing)
  for name, extra in (('v5e:2x4', 'tpu'), ('h100', 'cuda')):
    with pytest.raises(UsageError, match=rf'{name}.*imta_jax\[{extra}\]'):
      targets.open_target(name)


def test_a_batch_that_the_devices_do_not_divide_is_refused():
  target = targets.Target('h100:8', [None] * 8)
  with pytest.raises(UsageError, match='batch size 12 is not divisible by the 8 devices'):
    plan.plan(None, target, 1, 12)


@pytest.mark.parametrize('reason', ['RESOURCE_EXHAUSTED: out of memory', 'INTERNAL: crash'])
def test_a_step_that_the_compiler_cannot_fit_does_not_fit(reason, monkeypatch):
  def compile(*_):
    raise jax.errors.JaxRuntimeError(reason)

  monkeypatch.setattr(plan, '_compile', compile)
  config = config_lib.load(f'{ROOT}/configs/mnist5k.py:exits=1')
  arguments = (config, targets.Target('cpu', jax.devices('cpu')), 1, 16)
  if reason.startswith('INTERNAL'):
    with pytest.raises(jax.errors.JaxRuntimeError, match='crash'):
      plan.plan(*arguments)
  else:
    record = plan.plan(*arguments)
    assert not record['fits'] and record['peak_bytes'] is None and record['operations'] > 0


@pytest.mark.parametrize(('most', 'first'), [(300, 64), (300, 512), (64, 64)])
def test_the_largest_batch_is_found_to_an_eighth(most, first):
  planned = []

  def plan_batch(batch_size):
    assert batch_size % 8 == 0 and batch_size not in planned
    planned.append(batch_size)
    return {'batch_size': batch_size, 'fits': batch_size <= most}

  last = plan_batch(first)
  records = [last, *plan.search_largest(plan_batch, 8, last)]
  largest = max(record['batch_size'] for record in records if record['fits'])
  smallest_failing = min(size for size in planned if size > most)
  assert largest <= most < smallest_failing
  assert smallest_failing - largest <= max(8, largest // 8)


def test_the_cpu_has_no_largest_batch():
  with pytest.raises(UsageError, match='--largest: the memory of cpu is unknown'):
    plan.main([f'--config={ROOT}/configs/mnist5k.py', '--target=cpu', '--largest'])
