"""Random networks: whatever is built, a group that is found must be a symmetry.

`VFJAX_FUZZ=500 pytest tests/propagate/test_fuzz.py` builds 500 networks instead of 60, and others
each time.
"""

from __future__ import annotations

import os

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_networks import BATCH, OPERATIONS, leaves_of, network

from vfjax._analysis import from_propagation, leaf_effects
from vfjax._jaxpr import flatten
from vfjax._propagate import RULES, propagate
from vfjax._trees import leaf_paths

NETWORKS = int(os.environ.get("VFJAX_FUZZ", "60"))


def draw(rng, spec, name):
    """A permutation, or one for each entry of the group that it is within."""
    heads = spec.sizes[spec.within[name]] if name in spec.within else None
    found = [rng.permutation(spec.sizes[name]) for _ in range(heads or 1)]
    return found[0] if heads is None else np.stack(found)


def built(program, rng, start=jnp.tanh):
    """A random network's function, leaves, input and spec."""
    x = rng.normal(size=(BATCH, 4))
    leaves = []
    for shape, dtype in leaves_of(program, x, start):
        leaf = rng.normal(size=shape) / np.sqrt(shape[0] if shape else 1)
        leaves.append(leaf + 1j * rng.normal(size=shape) if dtype is complex else leaf)

    def apply(leaves, x):
        given = iter(leaves)
        return network(program, lambda shape, dtype: next(given), x, start)

    closed = jax.make_jaxpr(lambda *a: apply(a[:-1], a[-1]))(*leaves, x)
    graph = flatten(closed, len(leaves))
    spec, _ = from_propagation(propagate(graph), leaf_paths(leaves), leaf_effects(graph, ()))

    def run(leaves):
        return np.concatenate([np.ravel(out) for out in compiled(leaves, x)])

    compiled = jax.jit(apply)
    return run, leaves, spec


def change(program):
    """Largest relative change of a random network's outputs, and the number of its groups."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(program))
        run, leaves, spec = built(program, rng)
        if not spec.groups:
            return 0.0, 0
        before = run(leaves)
        moved = 0.0
        for _ in range(3):
            permutations = {name: draw(rng, spec, name) for name in spec.groups}
            moved = max(
                moved, np.abs(run(spec.permute(leaves, permutations, also={})) - before).max()
            )
        return moved / (np.abs(before).max() + 1e-9), len(spec.groups)


def reaches(program, before):
    """Whether a group of the first layer goes on past the leaves of the `before` first steps."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        _, leaves, spec = built(program, rng)
        first, *_ = paths = leaf_paths(leaves)
        x = np.zeros((BATCH, 4))
        later = set(paths[len(leaves_of(program[:before], x)) - 1 :])  # the last is its head's
        return any(
            later & {place.path for place in places}
            for places in spec.groups.values()
            if (first, 1) in {(place.path, place.axis) for place in places}
        )


STEPS = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 5))
PROGRAMS = st.lists(STEPS, max_size=7)
SETTINGS = hypothesis.settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize="VFJAX_FUZZ" not in os.environ,
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
gather_under_vmap pick product_scale reverse scale shuffle slices split_axis transpose""".split()
LINEAR_PROGRAMS = st.lists(st.tuples(st.sampled_from(LINEAR), st.integers(0, 5)), max_size=7)


def mixing(program):
    """Largest relative change of a linear network's output when its features change basis."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(len(program))
        run, leaves, spec = built(program, rng, start=jnp.asarray)
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
        before, after = run(leaves), run(spec.apply(leaves, maps))
        return np.abs(after - before).max() / (np.abs(before).max() + 1e-9), len(maps)


@hypothesis.settings(SETTINGS, max_examples=2 * NETWORKS // 3)
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


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_groups_pass_through_each_operation(name):
    """In one of its variants at least. Networks whose parts are all fixed would show nothing."""
    for context in ([("positions", 0)], []):
        for n in range(6):
            program = [*context, (name, n), ("activation", 1)]
            if reaches(program, len(context)):
                assert change(program)[0] < 1e-8
                return
    raise AssertionError(f"{name} fixes all that it meets")


FAULTS = {  # an operation, its primitive, and a rule that forgets what breaks the symmetry
    "reverse": ("rev", lambda step: [step.inputs[0].axes]),
    "fourier": ("fft", lambda step: [step.inputs[0].axes]),
    "scatter_rows": ("scatter-add", lambda step: [step.inputs[0].axes]),
    "experts": (
        "ragged_dot_general",
        lambda step: [[step.inputs[0].axes[0], step.inputs[1].axes[2]]],
    ),
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
