"""Functions written in ONNX against the functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imta_jax import models
from imta_jax.adaptive.engine import AdaptiveClassifier
from imta_jax.errors import UsageError

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

from imta_jax.interop.onnx_graph import to_onnx, write_stages  # noqa: E402

RANDOM = np.random.default_rng(0)
WEIGHTS = {
  'kernel': RANDOM.standard_normal((3, 3, 4, 6)).astype('f4'),
  'depthwise': RANDOM.standard_normal((3, 3, 1, 4)).astype('f4'),
  'matrix': RANDOM.standard_normal((4, 5)).astype('f4'),
  'vector': RANDOM.uniform(0.5, 1, 4).astype('f4'),
  'bias': RANDOM.standard_normal(6).astype('f4'),
  'offset': RANDOM.standard_normal(6).astype('f4'),
  'scalar': np.array(0.3, 'f4'),
}


def convolve(x, kernel, stride=1, groups=1):
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), ((1, 1), (0, 1)), None, None, numbers, groups
  )


def attend(x):
  tokens = x.reshape(x.shape[0], -1, 4)
  first = jnp.broadcast_to(jnp.arange(4.0), (x.shape[0], 1, 4))
  tokens = jnp.concatenate([first, tokens], axis=1)
  weights = jax.nn.softmax(jnp.einsum('bic,bjc->bij', tokens, tokens))
  return jnp.einsum('bij,bjc->bic', weights, tokens)[:, 0]


def on_cpu(x):
  return jax.lax.platform_dependent(x, cpu=lambda x: x - 1, default=lambda x: x + 1)


FUNCTIONS = {
  'a strided convolution': lambda w, x: jax.nn.relu(convolve(x, w['kernel'], 2) + 1),
  'a depthwise convolution': lambda w, x: convolve(x, w['depthwise'], groups=4) * w['vector'],
  'a product of pixels': lambda w, x: x @ w['matrix'],
  'what is for all platforms': lambda w, x: on_cpu(x),
  'max pooling': lambda w, x: jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
  ),
  'average pooling': lambda w, x: (
    jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID') / 4
  ),
  'a mean whose axes change': lambda w, x: x.sum(axis=1).transpose(2, 0, 1) / 6,
  'a dense layer': lambda w, x: x.mean(axis=(1, 2)) @ w['matrix'] + 1,
  'the extremes': lambda w, x: jnp.minimum(x.max(axis=(1, 2)), 0.5) - x.min(axis=(1, 2)),
  'ReLU6': lambda w, x: jnp.minimum(jax.nn.relu(4 * convolve(x, w['kernel'])), 6),
  'a part of a map of two': lambda w, x: jax.lax.slice(
    jnp.concatenate([convolve(x, w['kernel']), x[:, :, :5]], axis=-1),
    (0, 0, 1, 2),
    (x.shape[0], 6, 5, 10),
    (1, 2, 1, 1),
  ),
  'a flattened map': lambda w, x: convolve(x, w['kernel']).reshape(x.shape[0], -1),
  'a split': lambda w, x: jnp.multiply(*jnp.split(convolve(x, w['kernel']), 2, axis=-1)),
  'a split of joined convolutions': lambda w, x: jnp.multiply(
    *jnp.split(
      jax.nn.relu(
        convolve(x, jnp.concatenate([w['kernel'], -w['kernel']], axis=-1))
        + jnp.concatenate([w['bias'], w['offset']])
      ),
      2,
      axis=-1,
    )
  ),
  'a split along another axis': lambda w, x: jnp.split(convolve(x, w['kernel']), 3, axis=1)[1],
  'a split of a sum': lambda w, x: jnp.multiply(
    *jnp.split(jax.nn.relu(convolve(x, w['kernel']) + w['scalar']), 2, axis=-1)
  ),
  'joined convolutions': lambda w, x: jax.nn.relu(
    jnp.concatenate([convolve(x, w['kernel']), convolve(2 * x, w['kernel'])], axis=-1)
    + jnp.concatenate([w['bias'], w['offset']])
  ),
  'joined convolutions and a number': lambda w, x: jax.nn.relu(
    jnp.concatenate([convolve(x, w['kernel']), convolve(2 * x, w['kernel'])], axis=1) + w['scalar']
  ),
  'padding': lambda w, x: jnp.pad(convolve(x, w['kernel']), ((0, 0), (1, 2), (0, 0), (0, 1))),
  'other axes': lambda w, x: jnp.transpose(convolve(x, w['kernel']), (0, 3, 2, 1)),
  'roots': lambda w, x: jax.lax.rsqrt(jnp.square(x) + 1) * jnp.sqrt(w['vector']) + x**3,
  'activations': lambda w, x: jax.nn.gelu(x, approximate=False) + jnp.tanh(x) * jax.nn.sigmoid(x),
  'a choice': lambda w, x: jnp.where((x > 0.5) & (x != 1), jax.lax.clamp(-1.0, x, 1.0), -x),
  'attention': lambda w, x: attend(x),
}


@pytest.mark.parametrize('opset', [17, 21])
@pytest.mark.parametrize('with_weights', [True, False])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_a_function_gives_the_same_in_onnx(name, with_weights, opset):
  (batch,) = jax.export.symbolic_shape('batch')
  spec = jax.ShapeDtypeStruct((batch, 6, 6, 4), np.float32)
  names = [] if with_weights else sorted(WEIGHTS)
  model = to_onnx(FUNCTIONS[name], WEIGHTS, spec, ['x'], ['y'], weight_names=names, opset=opset)
  onnx.checker.check_model(model, full_check=True)
  session = onnxruntime.InferenceSession(model.SerializeToString())
  read = {value.name for value in session.get_inputs()}
  for count in (1, 3):
    x = RANDOM.standard_normal((count, 6, 6, 4)).astype('f4')
    values = {'x': x} | ({} if with_weights else WEIGHTS)
    (result,) = session.run(None, {key: value for key, value in values.items() if key in read})
    with jax.default_device(jax.devices('cpu')[0]):
      expected = FUNCTIONS[name](WEIGHTS, x)
    if name == 'what is for all platforms':
      expected = x + 1
    np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())
  if name == 'ReLU6':  # Which runtimes compute with the convolution, unlike Relu and Min.
    assert {'Clip'} == {node.op_type for node in model.graph.node} & {'Clip', 'Relu', 'Min'}
    assert expected.min() == 0 and expected.max() == 6
  if name == 'joined convolutions':
    *_, last, _, _ = (node.op_type for node in model.graph.node)  # Then Transpose and Identity.
    assert last == 'Concat'


def test_maps_are_transposed_where_they_enter_and_leave(tiny_msdnet, random_variables):
  model = tiny_msdnet(num_classes=5, collaboration='network')
  classifier = AdaptiveClassifier.from_model(
    model, random_variables(model, (8, 8, 3)), [0.5, 0], (8, 8, 3), mean=[0.5] * 3, std=[0.2] * 3
  )
  first, _ = write_stages(classifier.stages, classifier.weights, classifier.image)
  kinds = [node.op_type for node in first.graph.node]
  num_maps = len(first.graph.output) - 1
  assert kinds[:2] == ['Transpose', 'Cast']  # Runtimes normalize planes of colours faster.
  assert kinds.count('Transpose') == 1 + num_maps
  assert {'Conv', 'Relu', 'Concat', 'AveragePool', 'MatMul'} <= set(kinds)
  assert kinds.count('Mul') == kinds.count('Sqrt') == 0  # Batch norm is folded.


@pytest.mark.parametrize('with_weights', [True, False])
def test_each_convolution_has_its_own_bias_and_relu(tiny_msdnet, random_variables, with_weights):
  model = tiny_msdnet(num_classes=5)
  classifier = AdaptiveClassifier.from_model(
    model, random_variables(model, (8, 8, 3)), [0.5, 0], (8, 8, 3)
  )
  for stage in write_stages(
    classifier.stages, classifier.weights, classifier.image, with_weights=with_weights
  ):
    of_images = {value.name for value in stage.graph.input if 'map' in value.name}
    kinds = {}
    for node in stage.graph.node:
      kinds[node.output[0]] = node.op_type
      if node.op_type == 'Conv' or of_images.intersection(node.input):
        of_images.update(node.output)
        assert node.op_type != 'Split'
      if node.op_type in ('Add', 'Relu') and node.input[0] in of_images:
        assert kinds[node.input[0]] in ('Conv', 'Add', 'MatMul')


@pytest.mark.parametrize(
  ('function', 'message'),
  [
    (lambda w, x: jax.lax.fori_loop(0, 3, lambda i, x: x + i, x), "nothing like 'scan'"),
    (lambda w, x: jnp.sort(x), "nothing like 'sort'"),
    (lambda w, x: jnp.einsum('bhwc,bhwd->bcd', x, x), 'a product over several axes'),
  ],
)
def test_what_onnx_cannot_do_is_refused_by_name(function, message):
  spec = jax.ShapeDtypeStruct((2, 4, 4, 3), np.float32)
  with pytest.raises(UsageError, match=message):
    to_onnx(function, {}, spec, ['x'], ['y'])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'fields'),
  [
    ('resnet', {'depth': 18, 'stem': 'imagenet', 'exits_after': (4,)}),
    ('densenet', {'depth': 22, 'exits_after': (6,)}),
    ('googlenet', {}),
    ('efficientnet_lite', {'exits_after': (4,)}),
    ('vit', {'size': 'ti', 'exits_after': (4,)}),
  ],
)
@pytest.mark.parametrize('runtime', ['openvino', 'onnxruntime'])
def test_every_network_gives_our_answers(name, fields, runtime, random_variables):
  pytest.importorskip(runtime)
  model = models.create(name, num_classes=5, **fields)
  shape = (64, 64, 3)
  classifier = AdaptiveClassifier.from_model(
    model,
    random_variables(model, shape),
    [np.inf] * model.num_exits,
    shape,
    madds=range(1, model.num_exits + 1),
    runtime=runtime,
  )
  images = RANDOM.standard_normal((5, *shape)).astype('f4')
  carry = images
  for stage, weights in zip(classifier.stages, classifier.weights, strict=True):
    carry = jax.jit(stage)(weights, carry)
  expected = jax.nn.softmax(carry[1])
  np.testing.assert_allclose(classifier.predict(images).probabilities, expected, atol=2e-3)
