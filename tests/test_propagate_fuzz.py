"""Random networks: whatever is built, a group that is found must be a symmetry."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vfjax._graph import flatten
from vfjax._propagate import RULES, propagate
from vfjax._tree import leaf_paths
from vfjax.symmetry import from_propagation

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
    groups = [g for g in (1, 2, 3, channels) if channels % g == 0][n % 2 + n % 3 - 1]
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


def network(program, leaf, x):
    """Runs a program; a skip connection joins where the shape is that of the first layer."""
    h = first = jnp.tanh(x @ leaf((x.shape[-1], 12)))
    for name, n in program:
        result = OPERATIONS[name](h, n, leaf)
        if 0 < result.size <= LARGEST:
            h = result
        if n == 5 and h.shape == first.shape:
            h = h + first
    h = h.reshape(BATCH, -1)
    return h @ leaf((h.shape[-1], 2))


def change(program):
    """Largest relative change of a random network's output, and the number of its groups."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(program))
        x, shapes = rng.normal(size=(BATCH, 4)), []

        def record(shape):
            shapes.append(shape)
            return jnp.zeros(shape)

        jax.eval_shape(lambda x: network(program, record, x), x)
        leaves = [rng.normal(size=s) / np.sqrt(s[0]) for s in shapes]

        def apply(leaves, x):
            given = iter(leaves)
            return network(program, lambda shape: next(given), x)

        closed = jax.make_jaxpr(lambda *a: apply(a[:-1], a[-1]))(*leaves, x)
        propagation = propagate(flatten(closed, len(leaves)))
        spec, _ = from_propagation(propagation, leaf_paths(leaves))
        if not spec.groups:
            return 0.0, 0
        compiled = jax.jit(apply)
        before = np.asarray(compiled(leaves, x))
        moved = 0.0
        for _ in range(3):
            permutations = {name: rng.permutation(n) for name, n in spec.sizes.items()}
            after = np.asarray(compiled(spec.permute(leaves, permutations), x))
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


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_each_operation_alone(name):
    moved, groups = change([("dense", 1), (name, 3), ("activation", 1), ("transpose", 1)])
    assert moved < 1e-8
    assert groups  # if only the first layer's


FAULTS = {  # an operation, its primitive, and a rule that forgets what breaks the symmetry
    "reverse": ("rev", lambda step: [step.inputs[0].axes]),
    "cumulate": ("cumsum", lambda step: [step.inputs[0].axes]),
    "bias": ("add", lambda step: [max((v.axes for v in step.inputs), key=len)]),
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
