"""Values without parameters: no reader of one is tied to another, and its bits count as they are.

The right groups are those of the same network in which each use has a constant of its own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from helpers import change, infer, of_shapes

N = 6  # entries of each hidden axis
SHAPES = {"a": (4, N), "b": (N, N), "v": (N, 3)}
VARIABLES = of_shapes(SHAPES, 0)
X = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


def masked(masks):
    """A network whose two hidden layers are multiplied by what `masks(x)` returns."""

    def apply(p, x):
        first, second = masks(x)
        h = jnp.tanh(x @ p["a"]) * first
        return (jnp.tanh(h @ p["b"]) * second) @ p["v"]

    return apply


def twice(value):
    return value, value


ROWS = np.ones((2, 1, N), np.float32)


@jax.custom_jvp
def halved(x):
    return x * jnp.full(N, 0.5)[None]


halved.defjvp(lambda primals, tangents: (halved(*primals), 0.5 * tangents[0]))


def by_loops(x):
    """The mask is carried through one loop, and is a constant of another one."""
    mask = jnp.ones((5, N))

    def body(carry, row):
        h, kept = carry
        return (jnp.sin(h + row.sum()) * kept, kept), None

    (h, kept), _ = lax.scan(body, (jnp.zeros((5, N)), mask), x.T)
    count, _ = lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1]), (0, mask))
    return h + kept, count + mask


SHARED = {
    "rows of an array": lambda x: (ROWS[0], ROWS[1]),
    "rows of a traced array": lambda x: tuple(jnp.asarray(ROWS)),
    "the same array": lambda x: twice(jnp.asarray(ROWS[0])),
    "computed": lambda x: twice(jnp.ones((2, N)).sum(0)[None]),
    "of the input": lambda x: twice(jnp.broadcast_to(x[:, :1] > 0, (5, N)) * 1.0),
    "like the input": lambda x: twice(jnp.ones_like(x[:, :1]) * jnp.ones((1, N))),
    "flattened": lambda x: twice(jnp.ones((2, 3)).reshape(1, N)),
    "tiled": lambda x: twice(jnp.tile(jnp.ones((1, 3)), (1, 2))),
    "joined": lambda x: twice(jnp.stack([jnp.ones((1, N)), jnp.zeros((1, N))]).sum(0)),
    "sliced": lambda x: (ROWS[0], jnp.ones((1, 2 * N))[:, N // 2 : -N // 2]),
    "inside a call": lambda x: twice(jax.jit(lambda: jnp.ones((1, N)))()),
    "by loops": by_loops,
}


@pytest.mark.parametrize("name", SHARED)
def test_uses_of_a_constant_do_not_tie(name):
    apply = masked(SHARED[name])
    spec = infer(apply, VARIABLES, X)
    assert spec.sizes == {"a": N, "b": N}, spec
    assert change(apply, VARIABLES, X, spec) < 1e-5


def test_a_constant_inside_a_custom_call_does_not_tie():
    def apply(p, x):
        return halved(halved(x @ p["a"]) @ p["b"]) @ p["v"]

    assert infer(apply, VARIABLES, X).sizes == {"a": N, "b": N}


def test_a_constant_in_the_body_of_a_loop_does_not_tie():
    """The loop is too long to be unrolled, so that its body is followed once, for all steps."""
    mask = jnp.ones((5, N))

    def apply(p, x):
        def body(carry, row):
            inner, outer = carry
            inner = jnp.tanh(row @ p["a"] + inner) * mask
            return (inner, jnp.tanh(inner @ p["b"] + outer) * mask), None

        carry = jnp.zeros((5, N)), jnp.zeros((5, N))
        return lax.scan(body, carry, x)[0][1] @ p["v"]

    spec = infer(apply, VARIABLES, np.tile(X, (80, 1, 1)))
    assert spec.sizes == {"a": N, "b": N}, spec


def test_a_constant_that_leaves_a_loop_or_a_call_does_not_tie():
    """Though what leaves it along with the constant depends on parameters."""
    pair = jax.custom_jvp(lambda h, mask: (jnp.sin(h) * mask, mask))
    pair.defjvp(lambda given, tangents: (pair(*given), tangents))

    def apply(p, x):
        def body(_, carry):
            return jnp.sin(carry[0]) * carry[1], carry[1]

        h, mask = lax.fori_loop(0, 2, body, (x @ p["a"], jnp.ones((5, N))))
        h, mask = pair(h, mask)
        while_body = lambda c: (c[0] + 1, jnp.sin(c[1]) * c[2], c[2])  # noqa: E731
        _, h, mask = lax.while_loop(lambda c: c[0] < 2, while_body, (0, h, mask))
        return (jnp.tanh(h @ p["b"]) * mask) @ p["v"]

    spec = infer(apply, VARIABLES, X)
    assert spec.sizes == {"a": N, "b": N}, spec
    assert change(apply, VARIABLES, X, spec) < 1e-5


def test_segments_of_a_constant_stay_apart():
    def masks(x):
        return twice(jnp.concatenate([jnp.ones((1, 2)), jnp.zeros((1, 4))], 1))

    spec = infer(masked(masks), VARIABLES, X)
    assert sorted(spec.sizes.values()) == [2, 2, 4, 4]
    assert change(masked(masks), VARIABLES, X, spec) < 1e-5


def test_each_layer_names_the_line_where_it_meets_a_constant():
    uneven = np.arange(1.0, N + 1, dtype=np.float32)[None]

    def apply(p, x):
        h = jnp.tanh(x @ p["a"]) * uneven
        h = jnp.tanh(h @ p["b"]) * uneven
        return h @ p["v"]

    line = apply.__code__.co_firstlineno
    where = {f.path: f.where for f in infer(apply, VARIABLES, X).fixed if f.axis == 1}
    assert where["a"] == f"test_constants.py:{line + 1}"
    assert where["b"] == f"test_constants.py:{line + 2}"


def test_values_of_leaves_stay_tied():
    def apply(p, x):
        return masked(lambda x: twice(p["m"]))(p, x)

    variables = {**VARIABLES, "m": np.linspace(1, 2, N, dtype=np.float32)[None]}
    assert [len(places) for places in infer(apply, variables, X).groups.values()] == [5]


def carried(step):
    """Masks from a constant that a loop changes at each step: only its first value is even."""

    def masks(x):
        def body(carry, _):
            mask, seen = carry
            return (step(mask), seen + mask), None

        return lax.scan(body, (jnp.ones((1, N)), jnp.zeros((1, N))), None, length=3)[0]

    return masks


@pytest.mark.parametrize(
    "step",
    [lambda mask: mask + jnp.arange(1.0 * N)[None], lambda mask: jnp.cumsum(mask, axis=1)],
)
def test_a_carry_that_becomes_uneven_frees_nothing(step):
    assert not infer(masked(carried(step)), VARIABLES, X).groups


def test_a_carry_that_stays_even_frees_all():
    apply = masked(carried(jnp.sin))
    assert infer(apply, VARIABLES, X).sizes == {"a": N, "b": N}


# ------------------------------------------------------------------------------------------- bits

SIGNED = np.array([[-0.0, 0.0, 0.0, -0.0, 0.0, 0.0]], np.float32)
NANS = np.where(SIGNED.view(np.int32) < 0, np.int32(-4194304), np.int32(2143289344))
EQUAL = {  # numbers that are equal, and what tells them apart
    "copysign": lambda h: jnp.copysign(jnp.abs(h) + 1, SIGNED),
    "arctan2": lambda h: jnp.arctan2(jnp.asarray(SIGNED), -1 - jnp.abs(h)),
    "reciprocal": lambda h: jnp.maximum(h, jnp.clip(1 / jnp.asarray(SIGNED), -1, 1)),
    "nextafter": lambda h: h + 1e38 * jnp.nextafter(jnp.asarray(SIGNED), SIGNED),
    "bits": lambda h: h * lax.bitcast_convert_type(jnp.asarray(SIGNED), jnp.int32),
    "complex": lambda h: h * jnp.angle(lax.complex(SIGNED - 1, SIGNED)),
    "bits of NaN": lambda h: h * (lax.bitcast_convert_type(NANS.view(np.float32), jnp.int32) >> 31),
    "half precision": lambda h: jnp.copysign(h, jnp.asarray(SIGNED, jnp.bfloat16)),
}


def with_operation(op):
    def apply(p, x):
        return op(x @ p["a"]) @ p["v"]

    return apply


@pytest.mark.parametrize("name", EQUAL)
def test_equal_constants_of_other_bits_are_not_interchangeable(name):
    apply = with_operation(EQUAL[name])
    spec = infer(apply, VARIABLES, X)
    assert "a" not in spec.groups, spec
    assert change(apply, VARIABLES, X, spec) < 1e-5


def test_the_signs_of_zeros_matter_here():
    """Else the test before this one would show nothing: one order of `a` and `v` is told apart."""
    permuted = {**VARIABLES, "a": VARIABLES["a"][:, ::-1], "v": VARIABLES["v"][::-1]}
    for name in ("copysign", "arctan2", "reciprocal", "complex"):
        apply = with_operation(EQUAL[name])
        assert float(jnp.abs(apply(permuted, X) - apply(VARIABLES, X)).max()) > 1e-2, name


def test_equal_bits_are_interchangeable_even_where_numbers_are_not_equal():
    def apply(p, x):
        h = x @ p["a"]
        return jnp.where(jnp.isnan(jnp.full((1, N), np.nan) * h), jnp.sin(h), h) @ p["v"]

    spec = infer(apply, VARIABLES, X)
    assert spec.sizes == {"a": N}
    nan = np.full((1, N), np.nan, np.float32)
    spec = infer(with_operation(lambda h: jnp.where(jnp.isnan(nan), h, 2 * h)), VARIABLES, X)
    assert spec.sizes == {"a": N}
