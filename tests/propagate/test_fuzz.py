"""Random networks: whatever is built, a group that is found must be a symmetry."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vfjax._analysis import from_propagation, leaf_effects
from vfjax._jaxpr import flatten
from vfjax._propagate import RULES, propagate
from vfjax._trees import leaf_paths

BATCH, LARGEST = 3, 400
OPERATIONS = {}


def operation(fn):
    OPERATIONS[fn.__name__] = fn
    return fn


def along(h, n):
    """An axis of h other than the batch."""
    return 1 + n % (h.ndim - 1)


def shaped(h, axis):
    """The shape of a leaf that varies along one axis only."""
    return tuple(h.shape[k] if k == axis else 1 for k in range(h.ndim))


@operation
def dense(h, n, leaf):
    return h @ leaf((h.shape[-1], (4, 6, 12)[n % 3]))


@operation
def dense_out_in(h, n, leaf):
    axis = along(h, n)
    return jnp.moveaxis(jnp.tensordot(leaf((6, h.shape[axis])), h, axes=(1, axis)), 0, axis)


@operation
def bias(h, n, leaf):
    return h + leaf(shaped(h, along(h, n)))


@operation
def embed(h, n, leaf):
    """A shift that varies along all axes, as that of positions."""
    return h + leaf((1, *h.shape[1:]))


@operation
def scale(h, n, leaf):
    return h * leaf(shaped(h, along(h, n)))


@operation
def activation(h, n, leaf):
    return (jax.nn.relu, jnp.tanh, jax.nn.gelu, jax.nn.silu, jnp.sin, jnp.square)[n % 6](h)


@operation
def gate(h, n, leaf):
    return h * jax.nn.sigmoid(h @ leaf((h.shape[-1], h.shape[-1])))


@operation
def residual(h, n, leaf):
    inner = jnp.tanh(h @ leaf((h.shape[-1], 5)))
    return h + inner @ leaf((5, h.shape[-1]))


@operation
def softmax(h, n, leaf):
    return jax.nn.softmax(h, axis=along(h, n))


@operation
def norm(h, n, leaf):
    axis = along(h, n)
    h = h - h.mean(axis, keepdims=True)
    return h / jnp.sqrt(1e-3 + (h * h).mean(axis, keepdims=True)) * leaf(shaped(h, axis))


@operation
def attention(h, n, leaf):
    flat = h.reshape(BATCH, h.shape[1], -1)
    query, key = (flat @ leaf((flat.shape[-1], 4)) for _ in range(2))
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", query, key))
    return jnp.einsum("bqk,bkd->bqd", scores, flat).reshape(h.shape)


@operation
def convolution(h, n, leaf):
    flat = h.reshape(BATCH, -1, h.shape[-1])
    channels = flat.shape[-1]
    options = [g for g in (1, 2, 3, channels) if channels % g == 0]
    groups = options[(n % 2 + n % 3 - 1) % len(options)]
    kernel = leaf((3, channels // groups, 2 * groups))
    dims = ("NHC", "HIO", "NHC")
    return lax.conv_general_dilated(
        flat, kernel, (1,), "SAME", dimension_numbers=dims, feature_group_count=groups
    )


@operation
def pool(h, n, leaf):
    axis = along(h, n)
    window = shaped(np.broadcast_to(2, (2,) * h.ndim), axis)
    return lax.reduce_window(h, -jnp.inf, lax.max, window, window, "SAME")


@operation
def split_axis(h, n, leaf):
    axis, factor = along(h, n), (2, 3)[n // 3 % 2]
    if h.shape[axis] % factor or h.ndim > 3:
        return h
    return h.reshape(*h.shape[:axis], factor, -1, *h.shape[axis + 1 :])


@operation
def merge_axes(h, n, leaf):
    return h.reshape(BATCH, -1, *h.shape[3:]) if n % 2 else h.reshape(BATCH, -1)


@operation
def across_examples(h, n, leaf):
    return jnp.tanh(h.reshape(-1, BATCH)).reshape(h.shape)


@operation
def transpose(h, n, leaf):
    return jnp.swapaxes(h, along(h, n), -1)


@operation
def reduce(h, n, leaf):
    return (jnp.mean, jnp.max)[n // 2 % 2](h, axis=along(h, n), keepdims=h.ndim < 3)


@operation
def centre(h, n, leaf):
    return h - jnp.maximum(h, 0.1).mean(along(h, n), keepdims=True)


@operation
def reverse(h, n, leaf):
    return jnp.flip(h, along(h, n))


@operation
def cumulate(h, n, leaf):
    return jnp.cumsum(h, axis=along(h, n))


@operation
def sort(h, n, leaf):
    return jnp.sort(h, axis=along(h, n))


@operation
def drop_first(h, n, leaf):
    axis = along(h, n)
    return lax.slice_in_dim(h, min(1, h.shape[axis] - 1), None, axis=axis)


@operation
def concatenate(h, n, leaf):
    return jnp.concatenate([h, jnp.cos(h)], axis=along(h, n))


@operation
def concatenate_layers(h, n, leaf):
    """As in a DenseNet: features, and those that a layer makes of them."""
    parts = [h, jnp.tanh(h @ leaf((h.shape[-1], 4)))]
    if n % 2:
        parts.append(parts[0] @ leaf((h.shape[-1], 3)))
    return jnp.concatenate(parts[::-1] if n % 3 else parts, axis=-1)


@operation
def split_and_gate(h, n, leaf):
    """As a gated linear unit; the parts may be of unequal size, and one may be dropped."""
    axis = along(h, n)
    size = h.shape[axis]
    cut = size // 2 if n % 2 else max(1, size // 3)
    first, second = jnp.split(h, [cut], axis=axis)
    if first.shape == second.shape:
        return first * jax.nn.sigmoid(second)
    return jnp.concatenate([jnp.sin(second), first], axis=axis) if n % 3 else second


@operation
def slices(h, n, leaf):
    axis = along(h, n)
    size = h.shape[axis]
    part = lax.slice_in_dim(h, size // 4, size - size // 4, axis=axis)
    return part + lax.slice_in_dim(h, 0, part.shape[axis], axis=axis) if n % 2 else part


@operation
def pad(h, n, leaf):
    config = [(0, 0, 0)] * h.ndim
    config[along(h, n)] = [(1, 2, 0), (2, 0, 0), (-1, 1, 0), (0, 1, 1)][n % 4]
    return lax.pad(h, jnp.asarray(0.5, h.dtype), config)


@operation
def padded_shortcut(h, n, leaf):
    """As option A of a ResNet: the shortcut's new channels are zero."""
    wide = jnp.tanh(h @ leaf((h.shape[-1], h.shape[-1] + 3)))
    return wide + jnp.pad(h, [(0, 0)] * (h.ndim - 1) + [(1, 2)])


@operation
def mix_parts(h, n, leaf):
    """A residual layer after a concatenation of parts of other sizes."""
    size = h.shape[-1]
    parts = [h @ leaf((size, k)) for k in (size // 3, size - size // 3)]
    return h + jnp.concatenate(parts, axis=-1) if parts[0].size else h


@operation
def depthwise_pointwise(h, n, leaf):
    flat = h.reshape(BATCH, -1, h.shape[-1])
    channels, dims = flat.shape[-1], ("NHC", "HIO", "NHC")
    flat = lax.conv_general_dilated(
        flat,
        leaf((3, 1, channels)),
        (1,),
        "SAME",
        dimension_numbers=dims,
        feature_group_count=channels,
    )
    return flat @ leaf((channels, 6))


@operation
def shuffle(h, n, leaf):
    """The channel shuffle between grouped convolutions."""
    groups = (2, 3)[n % 2]
    if h.shape[-1] % groups:
        return h
    parts = h.reshape(*h.shape[:-1], groups, -1)
    return jnp.swapaxes(parts, -1, -2).reshape(h.shape)


@operation
def fused_attention(h, n, leaf):
    """Queries, keys and values of one kernel, in the orders that libraries use."""
    heads, dims = 2, 3
    flat = h.reshape(BATCH, -1, h.shape[-1])
    fused = flat @ leaf((flat.shape[-1], 3 * heads * dims)) + leaf((1, 1, 3 * heads * dims))
    if n == 0:
        parts = [p.reshape(*p.shape[:2], heads, dims) for p in jnp.split(fused, 3, axis=-1)]
    elif n in (1, 2):
        parts = fused.reshape(*flat.shape[:2], 3, heads, dims)
        parts = list(jnp.moveaxis(parts, 2, 0)) if n == 1 else [parts[:, :, k] for k in range(3)]
    elif n == 3:
        parts = jnp.split(fused.reshape(*flat.shape[:2], heads, 3 * dims), 3, axis=-1)
    elif n == 4:
        parts = fused.reshape(*flat.shape[:2], heads, 3, dims)
        parts = [parts[..., k, :] for k in range(3)]
    else:  # rank 3 after all, and two of the three summed
        parts = fused.reshape(*flat.shape[:2], 3, heads, dims)
        parts = [parts[:, :, 0], parts[:, :, 1], parts.sum(2)]
    query, key, value = parts
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    out = jnp.einsum("bhqk,bkhd->bqhd", scores, value)
    return out.reshape(*flat.shape[:2], heads * dims) @ leaf((heads * dims, 6))


@operation
def split_attention(h, n, leaf):
    """Attention with a kernel each, and the heads an axis of the kernels or not."""
    flat = h.reshape(BATCH, -1, h.shape[-1])
    if n % 2:
        parts = [jnp.einsum("btc,chd->bthd", flat, leaf((flat.shape[-1], 2, 3))) for _ in range(3)]
    else:
        parts = [flat @ leaf((flat.shape[-1], 6)) for _ in range(3)]
        parts = [p.reshape(*p.shape[:2], 2, 3) for p in parts]
    if n % 3 == 1:
        parts[0] = parts[0] * leaf((1, 1, 1, 3))  # a scale that the heads share
    if n % 3 == 2:
        parts[2] = jnp.einsum("bthd,hg->btgd", parts[2], leaf((2, 2)))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", parts[0], parts[1]))
    return jnp.einsum("bhqk,bkhd->bqhd", scores, parts[2]).reshape(*flat.shape[:2], 6)


@operation
def tile(h, n, leaf):
    return jnp.tile(h, shaped(np.broadcast_to(2, (2,) * h.ndim), along(h, n)))


@operation
def repeat(h, n, leaf):
    return jnp.repeat(h, 2, axis=along(h, n))


@operation
def pick(h, n, leaf):
    axis = along(h, n)
    return jnp.take(h, jnp.arange(h.shape[axis] - 1, -1, -2), axis=axis)


@operation
def constant(h, n, leaf):
    shape = shaped(h, along(h, n))
    return h * (np.linspace(1, 2, np.prod(shape)).reshape(shape) if n % 2 else np.ones(h.shape))


@operation
def recur(h, n, leaf):
    rows = jnp.moveaxis(h, along(h, n), 0)
    weight = leaf((rows.shape[-1], rows.shape[-1]))

    def step(carry, row):
        carry = jnp.tanh(carry @ weight + row)
        return carry, carry

    return jnp.moveaxis(lax.scan(step, jnp.zeros_like(rows[0]), rows)[1], 0, along(h, n))


def network(program, leaf, x, start=jnp.tanh):
    """Runs a program; a skip connection joins where the shape is that of the first layer."""
    h = first = start(x @ leaf((x.shape[-1], 12)))
    for name, n in program:
        result = OPERATIONS[name](h, n, leaf)
        if 0 < result.size <= LARGEST:
            h = result
        if n == 5 and h.shape == first.shape:
            h = h + first
    h = h.reshape(BATCH, -1)
    return h @ leaf((h.shape[-1], 2))


def draw(rng, spec, name):
    """A permutation, or one for each entry of the group that it is within."""
    heads = spec.sizes[spec.within[name]] if name in spec.within else None
    found = [rng.permutation(spec.sizes[name]) for _ in range(heads or 1)]
    return found[0] if heads is None else np.stack(found)


def built(program, rng, start=jnp.tanh):
    """A random network's function, leaves, input and spec."""
    x, shapes = rng.normal(size=(BATCH, 4)), []

    def record(shape):
        shapes.append(shape)
        return jnp.zeros(shape)

    jax.eval_shape(lambda x: network(program, record, x, start), x)
    leaves = [rng.normal(size=s) / np.sqrt(s[0]) for s in shapes]

    def apply(leaves, x):
        given = iter(leaves)
        return network(program, lambda shape: next(given), x, start)

    closed = jax.make_jaxpr(lambda *a: apply(a[:-1], a[-1]))(*leaves, x)
    graph = flatten(closed, len(leaves))
    spec, _ = from_propagation(propagate(graph), leaf_paths(leaves), leaf_effects(graph, ()))
    return jax.jit(apply), leaves, x, spec


def change(program):
    """Largest relative change of a random network's output, and the number of its groups."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(program))
        apply, leaves, x, spec = built(program, rng)
        if not spec.groups:
            return 0.0, 0
        before = np.asarray(apply(leaves, x))
        moved = 0.0
        for _ in range(3):
            permutations = {name: draw(rng, spec, name) for name in spec.groups}
            after = np.asarray(apply(spec.permute(leaves, permutations), x))
            moved = max(moved, np.abs(after - before).max())
        return moved / (np.abs(before).max() + 1e-9), len(spec.groups)


STEPS = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5))
PROGRAMS = st.lists(STEPS, max_size=7)
SETTINGS = hypothesis.settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@SETTINGS
@hypothesis.given(PROGRAMS)
def test_groups_of_random_networks_are_symmetries(program):
    # In double precision rounding stays far below what a wrong group would change.
    assert change(program)[0] < 1e-8


# Of these no group is read but by layers: features may be mixed where they are unmixed.
# (A shift that is broadcast along a group is none: it adds to all features alike.)
LINEAR = """convolution dense dense_out_in depthwise_pointwise drop_first embed merge_axes mix_parts
pick reverse scale shuffle slices split_axis transpose""".split()
LINEAR_PROGRAMS = st.lists(st.tuples(st.sampled_from(LINEAR), st.integers(0, 5)), max_size=7)


def mixing(program):
    """Largest relative change of a linear network's output when its features change basis."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(program))
        apply, leaves, x, spec = built(program, rng, start=jnp.asarray)
        # A scale commutes with a change of basis where it is even.
        paths = leaf_paths(leaves)
        leaves = [
            np.full_like(leaf, 1.5) if path in spec.scaling else leaf
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        maps = {}
        for name, n in spec.sizes.items():
            if name not in spec.rigid:
                matrix = rng.normal(size=(n, n)) + 3 * np.eye(n)
                maps[name] = matrix, np.linalg.inv(matrix)
        before = np.asarray(apply(leaves, x))
        after = np.asarray(apply(spec.apply(leaves, maps), x))
        return np.abs(after - before).max() / (np.abs(before).max() + 1e-9), len(maps)


@SETTINGS
@hypothesis.given(LINEAR_PROGRAMS)
def test_a_change_of_basis_keeps_random_linear_networks(program):
    assert mixing(program)[0] < 1e-8


@pytest.mark.parametrize("name", LINEAR)
def test_a_change_of_basis_keeps_each_linear_operation(name):
    moved, groups = mixing([("dense", 1), (name, 3), ("embed", 1), ("transpose", 1)])
    assert moved < 1e-8
    assert groups


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_alone(name):
    moved, groups = change([("dense", 1), (name, 3), ("activation", 1), ("transpose", 1)])
    assert moved < 1e-8
    assert groups  # if only the first layer's


FAULTS = {  # an operation, its primitive, and a rule that forgets what breaks the symmetry
    "reverse": ("rev", lambda step: [step.inputs[0].axes]),
    "cumulate": ("cumsum", lambda step: [step.inputs[0].axes]),
    "bias": ("add", lambda step: [max((v.axes for v in step.inputs), key=len)]),
    "pad": ("pad", lambda step: [[step.free(n) for n in step.shapes[0]]]),
    "split_and_gate": (
        "split",
        lambda step: [[step.free(n) for n in shape] for shape in step.shapes],
    ),
    "concatenate_layers": ("concatenate", lambda step: [[step.free(n) for n in step.shapes[0]]]),
    "pool": (
        "reduce_window_max",
        lambda step: [
            [a if n == m else step.free(m) for a, n, m in zip(v.axes, v.shape, s, strict=True)]
            for v, s in zip(step.inputs, step.shapes, strict=False)
        ],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_rule_is_found(name, monkeypatch):
    """The fuzz can fail: a rule that invents a symmetry does not survive it."""
    primitive, wrong = FAULTS[name]
    monkeypatch.setitem(RULES, primitive, wrong)
    part = st.lists(STEPS, max_size=2)
    programs = st.builds(lambda a, n, b: [*a, (name, n), *b], part, st.integers(0, 5), part)
    phases = [hypothesis.Phase.generate]  # the smallest counterexample is of no interest
    settings = hypothesis.settings(SETTINGS, max_examples=200, phases=phases)
    assert hypothesis.find(programs, lambda p: change(p)[0] > 1e-6, settings=settings)
