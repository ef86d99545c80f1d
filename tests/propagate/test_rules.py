"""Rules of single primitives: what they let through, what they stop, and that they say so."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import vfjax
from vfjax._analysis import from_propagation
from vfjax._jaxpr import flatten
from vfjax._propagate import RULES, propagate, rule
from vfjax._propagate.algebra import Algebra
from vfjax._propagate.atoms import Cause
from vfjax._trees import leaf_paths
from vfjax.symmetry import check_spec

RNG = np.random.default_rng(0)
VARIED = RNG.normal(size=(5, 6)).astype(np.float32)
N = 6  # entries of the hidden axis; 5 examples


def infer(fn, variables, x):
    leaves, treedef = jax.tree.flatten(variables)
    closed = jax.make_jaxpr(lambda *a: fn(jax.tree.unflatten(treedef, a[:-1]), a[-1]))(*leaves, x)
    return from_propagation(propagate(flatten(closed, len(leaves))), leaf_paths(variables))[0]


def change(fn, variables, x, spec, key=0):
    """Largest change of the output under random permutations, relative to its size."""
    net = types.SimpleNamespace(spec=spec, run=fn)
    size = float(jnp.abs(fn(variables, x)).max())
    return check_spec(net, variables, x, key=jax.random.key(key)) / size


def loop(h):
    return lax.fori_loop(0, 3, lambda i, c: jnp.sin(c) + h, jnp.zeros_like(h))


def scan_over_hidden(h):
    return lax.scan(lambda c, row: (c + row, c * row), jnp.zeros(5), h.T)[1].T


def scan_over_examples(h):
    return lax.scan(lambda c, row: (jnp.tanh(c + row), c * row), jnp.zeros(N), h)[1]


@jax.custom_vjp
def twice(h):
    return 2 * h


twice.defvjp(lambda h: (2 * h, None), lambda _, g: (2 * g,))


def dropout(h):
    return jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0.0)


def unequal_window(h):
    """A stride and a padding that leave the length as it was."""
    window = {"window_dimensions": (1, 1), "window_strides": (1, 2)}
    pooled = lax.reduce_window(h, -jnp.inf, lax.max, padding=((0, 0), (0, 5)), **window)
    return jnp.maximum(pooled, -9.0)


IDS = np.array([0, 1, 0, 2, 1])
PAIR = np.tile(np.array([[1.0], [2.0]], np.float32), (5, 6, 1, 1))
SQUARE = VARIED[:, :5] + 5 * np.eye(5, dtype=np.float32)
PAIRS = (2, 1), (2, 1), "VALID"  # windows of two examples


@jax.custom_batching.custom_vmap
def batched(h):
    return jnp.sin(h)


@batched.def_vmap
def _(size, along, h):
    return jnp.sin(h), True


def max_pool(h):
    return lax.reduce_window(h, -jnp.inf, lax.max, *PAIRS)


def write(h, update):
    """Row by row, each where its number says; under vmap all positions have an index."""
    whole = jax.vmap(lambda a, u, k: lax.dynamic_update_slice(a, u, (k, 0)))
    return whole(jnp.stack([h, 2 * h]), update, np.array([1, 3])).sum(0)


PASS = {
    "softmax": jax.nn.softmax,
    "logsumexp": lambda h: h - jax.nn.logsumexp(h, axis=-1, keepdims=True),
    "layer norm": lambda h: (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True)),
    "uniform constant": lambda h: h * np.full((5, 6), 3.0, np.float32),
    "constant along the axis": lambda h: h * VARIED[:, :1].repeat(6, 1),
    "literals": lambda h: jnp.where(h > 0.1, h, 0.3 * h) + 2,
    "clip": lambda h: jnp.clip(h, -0.5, 0.5),
    "integer": lambda h: jnp.round(10 * h).astype(jnp.int32).astype(jnp.float32),
    "max with broadcasting": lambda h: jnp.maximum(h, h.mean(-1, keepdims=True)),
    "cumsum of examples": lambda h: jnp.cumsum(h, axis=0),
    "sort of examples": lambda h: jnp.sort(h, axis=0),
    "argsort of examples": lambda h: jnp.argsort(h, axis=0).astype(jnp.float32),
    "reversed examples": lambda h: h[::-1],
    "slice of examples": lambda h: h[1:4:2],
    "padded examples": lambda h: jnp.pad(h, ((1, 2), (0, 0))),
    "concatenated examples": lambda h: jnp.concatenate([h, 2 * h]),
    "stacked": lambda h: jnp.stack([h, 2 * h]).sum(0),
    "unstacked": lambda h: sum(list(h[:, None])) * h,
    "pooled examples": lambda h: lax.reduce_window(h, 0.0, lax.add, (2, 1), (2, 1), "VALID"),
    "taken examples": lambda h: jnp.take(h, jnp.array([3, 1]), axis=0),
    "dynamic slice of examples": lambda h: lax.dynamic_slice(h, (1, 0), (2, 6)),
    "updated examples": lambda h: lax.dynamic_update_slice(h, 2 * h[:2], (1, 0)),
    "transposed": lambda h: jnp.tanh(h.T).T,
    "flattened and back": lambda h: jnp.tanh(h.reshape(30)).reshape(5, 6),
    "singletons": lambda h: jnp.squeeze(jnp.expand_dims(h, (0, 2)) * 2, (0, 2)),
    "gated": lambda h: h * jax.nn.sigmoid(h) + jnp.square(h),
    "scores": lambda h: jax.nn.softmax(h @ h.T) @ h,
    "cond": lambda h: lax.cond(h.sum() > 0, lambda a: a, lambda a: 2 * a, h),
    "while": loop,
    "scan": scan_over_examples,
    "remat": jax.checkpoint(lambda h: jnp.sin(h)),
    "custom_vjp": twice,
    "named": lambda h: checkpoint_name(h, "hidden"),
    "barrier": lambda h: lax.optimization_barrier((h, h))[0],
    "vmapped": lambda h: jax.vmap(lambda row: row / jnp.linalg.norm(row))(h),
    "rows added": lambda h: h.at[IDS].add(jnp.sin(h)),
    "rows subtracted": lambda h: h.at[IDS].subtract(h),
    "rows multiplied": lambda h: h.at[IDS].multiply(h),
    "least rows": lambda h: h.at[IDS].min(-h),
    "largest rows": lambda h: h.at[IDS].max(-h),
    "rows overwritten": lambda h: h.at[np.array([3, 1])].set(h[:2]),
    "rows cleared": lambda h: h.at[1:3].set(0.0),
    "rows changed": lambda h: h.at[IDS].apply(jnp.sin),
    "rows of a vmap": lambda h: write(h, jnp.stack([h[:2], h[2:4]])),
    "segments summed": lambda h: jax.ops.segment_sum(h, IDS, 3)[IDS],
    "segments compared": lambda h: jax.ops.segment_max(h, IDS, 3)[IDS],
    "gather under vmap": lambda h: jax.vmap(lambda k: h[k])(IDS),
    "gather of many under vmap": lambda h: jax.vmap(lambda a, k: a[k])(
        jnp.stack([h, -h]), IDS[2:4]
    ),
    "dynamic slice under vmap": lambda h: jax.vmap(
        lambda k: lax.dynamic_slice(h, (k, 0), (2, 6)).sum(0)
    )(IDS),
    "taken along examples": lambda h: jnp.take_along_axis(h, IDS[:, None], axis=0),
    "fft of examples": lambda h: jnp.abs(jnp.fft.fft(h, axis=0)),
    "rfft of examples": lambda h: jnp.fft.irfft(jnp.fft.rfft(h, axis=0) * 0.5, 5, axis=0),
    "solved": lambda h: jnp.linalg.solve(SQUARE, h),
    "solved in batches": lambda h: jnp.linalg.solve(
        h[:, :, None, None] ** 2 + np.eye(2)[None, None], PAIR
    )[..., 0].sum(-1),
    "solved by a triangle": lambda h: jax.scipy.linalg.solve_triangular(SQUARE, h, lower=True),
    "solved from the right": lambda h: lax.linalg.triangular_solve(SQUARE, h.T).T,
    "solved by iterations": lambda h: jax.scipy.sparse.linalg.cg(
        lambda a: 2 * a + a.mean(0, keepdims=True), h
    )[0],
    "whitened": lambda h: jnp.linalg.solve(h @ h.T + np.eye(5), h),
    "cholesky of examples": lambda h: jnp.linalg.cholesky(h @ h.T + np.eye(5)) @ h,
    "singular values": lambda h: h * jnp.linalg.svd(h @ h.T, compute_uv=False)[:, None],
    "approximately largest": lambda h: lax.approx_max_k(h, 3, reduction_dimension=0)[0],
    "derivative of a pool": lambda h: jax.grad(lambda a: jnp.square(max_pool(a)).sum())(h),
    "change of a pool": lambda h: jax.jvp(max_pool, (h,), (jnp.sin(h),))[1],
    "composite": lax.composite(lambda h: jnp.sin(h), name="of.sines"),
    "custom_vmap": batched,
    "noise on examples": lambda h: h * jax.random.normal(jax.random.key(0), (5, 1)),
    "scaled": lambda h: jnp.einsum("bd,b->bd", h, SQUARE[0]),
    "bitcast": lambda h: lax.bitcast_convert_type(h, jnp.int32).astype(jnp.float32) * 1e-9,
}

STOP = {  # name: (function, the primitive to blame)
    "varied constant": (lambda h: h * VARIED, "constant"),
    "iota": (lambda h: h + jnp.arange(6.0)[None], "iota"),
    "rev": (lambda h: h[:, ::-1], "rev"),
    "cumsum": (lambda h: jnp.cumsum(h, axis=1), "cumsum"),
    "sort": (lambda h: jnp.sort(h, axis=1), "sort"),
    "argmax": (lambda h: jnp.argmax(h, axis=1)[:, None] + jnp.ones((1, 6)), "argmax"),
    "top_k": (lambda h: lax.top_k(h, 3)[0], "top_k"),
    "strided slice": (lambda h: h[:, 1:5:2], "slice"),
    "dilated": (lambda h: lax.pad(h, 0.0, ((0, 0, 0), (1, 0, 1))), "pad"),
    "stacked": (lambda h: jnp.stack([h, 2 * h], 2).reshape(5, 12)[:, ::3], "slice"),
    "shifted by one": (lambda h: jnp.roll(h, 1, axis=1) + h, "slice"),
    "single entries": (lambda h: jnp.concatenate(list(h.T[:, :, None]), axis=1), None),
    "dynamic_slice": (lambda h: lax.dynamic_slice(h, (0, 1), (5, 3)), "dynamic_slice"),
    "gather": (lambda h: jnp.take(h, jnp.array([3, 1]), axis=1), "gather"),
    "window": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2), (1, 2), "VALID"),
        "reduce_window_sum",
    ),
    "equal window": (unequal_window, "reduce_window_max"),
    "scan over it": (scan_over_hidden, "scan"),
    "dropout": (dropout, None),
    "fft": (lambda h: jnp.fft.fft(h).real, "fft"),
    "fft of both": (lambda h: jnp.abs(jnp.fft.fft2(h)), "fft"),
    "scatter": (lambda h: h.at[:, 2].set(1.0), "scatter"),
    "columns added": (lambda h: h.at[:, 2].add(1.0), "scatter-add"),
    "columns cleared": (lambda h: h.at[:, 1:3].set(0.0), "scatter"),
    "columns reordered": (
        lambda h: jnp.zeros((5, 6)).at[:, np.array([3, 1, 0, 2, 5, 4])].max(h),
        None,
    ),
    "columns overwritten": (
        lambda h: jnp.zeros((3, 5)).at[np.array([0, 2, 0, 1, 1, 0])].set(h.T).T,
        None,
    ),
    "gather under vmap": (lambda h: jax.vmap(lambda k: h[:, k])(np.array([3, 1])).T, "gather"),
    "solve": (lambda h: jnp.linalg.solve(h.T @ h + np.eye(6), h.T).T, None),
    "cholesky": (lambda h: h @ jnp.linalg.cholesky(h.T @ h + np.eye(6)), None),
    "approx_top_k": (lambda h: lax.approx_max_k(h, 3)[0], "approx_top_k"),
    "noise": (lambda h: h * jax.random.normal(jax.random.key(0), h.shape), "random_bits"),
    "bits": (
        lambda h: h * lax.rng_bit_generator(np.ones(4, np.uint32), h.shape)[1] * 1e-9,
        "rng_bit_generator",
    ),
}


def network(op, rows):
    """A hidden layer, the operation, and another layer with as many inputs as it returns."""
    variables = {
        "w": RNG.normal(size=(4, N)).astype(np.float32),
        "b": RNG.normal(size=(1, N)).astype(np.float32),
        "v": RNG.normal(size=(rows, 3)).astype(np.float32),
    }

    def apply(p, x):
        return op(jnp.asarray(x @ p["w"] + p["b"])) @ p["v"]

    return apply, variables, RNG.normal(size=(5, 4)).astype(np.float32)


@pytest.mark.parametrize("name", PASS)
def test_symmetries_pass(name):
    apply, variables, x = network(PASS[name], N)
    spec = infer(apply, variables, x)
    places = {(a.path, a.axis, a.role) for a in spec.groups.get("w", ())}
    assert places == {("w", 1, "out"), ("b", 1, "elementwise"), ("v", 0, "in")}, spec
    assert change(apply, variables, x, spec) < 1e-5


@pytest.mark.parametrize("name", STOP)
def test_symmetries_stop(name):
    op, blamed = STOP[name]
    rows = jax.eval_shape(op, jnp.zeros((5, N))).shape[-1]
    apply, variables, x = network(op, rows)
    spec = infer(apply, variables, x)
    assert not any(a.path == "w" for axes in spec.groups.values() for a in axes), spec
    (entry,) = [f for f in spec.fixed if (f.path, f.axis) == ("w", 1)]
    assert blamed in (None, entry.primitive)
    assert change(apply, variables, x, spec) < 1e-5  # some keep a symmetry of `v` alone


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        (lambda h: h.reshape(5, 2, 3).sum(1), [2, 3]),
        (lambda h: h.reshape(5, 3, 2).transpose(0, 2, 1).reshape(5, 6), [2, 3]),
        (lambda h: jnp.tile(h, (1, 2)), [2, 6]),
        (lambda h: jnp.repeat(h, 2, axis=1), [2, 6]),
        (lambda h: jnp.tanh(h.reshape(10, 3)).reshape(5, 6), [2, 3]),
        (lambda h: h.reshape(5, 2, 3) @ jnp.ones((3, 4)), [2, 4, 3]),  # v's rows of the constant
        (lambda h: (h[:, :, None] * h[:, None, :]).reshape(5, 36), [6]),
        (lambda h: jnp.tanh(h.reshape(6, 5)).reshape(5, 6), []),  # cuts across examples
    ],
)
def test_products_of_axes(op, sizes):
    def flat(h):
        return op(h).reshape(5, -1)

    apply, variables, x = network(flat, jax.eval_shape(flat, jnp.zeros((5, N))).shape[-1])
    spec = infer(apply, variables, x)
    assert sorted(spec.sizes.values()) == sorted(sizes), spec
    if sizes:
        assert max(change(apply, variables, x, spec, k) for k in range(3)) < 1e-5


def test_recurrent_network_in_a_long_scan():
    shapes = {"w": (4, 6), "u": (6, 6), "v": (6, 3)}
    variables = {k: RNG.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}

    def apply(p, x):
        def step(h, row):
            return jnp.tanh(row @ p["w"] + h @ p["u"]), None

        h, _ = lax.scan(step, jnp.zeros((2, 6)), x)
        return h @ p["v"]

    x = RNG.normal(size=(70, 2, 4)).astype(np.float32)  # longer than what is unrolled
    spec = infer(apply, variables, x)
    (axes,) = spec.groups.values()
    roles = {(a.path, a.axis): a.role for a in axes}
    assert roles == {("w", 1): "out", ("u", 0): "in", ("u", 1): "out", ("v", 0): "in"}
    assert change(apply, variables, x, spec) < 1e-4  # 70 steps of rounding


def test_stacked_layers_have_groups_of_their_own():
    shapes = {"w": (3, 6, 8), "u": (3, 8, 6), "head": (6, 2)}
    variables = {k: RNG.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}
    x = RNG.normal(size=(5, 6)).astype(np.float32)

    def apply(p, x):
        def layer(h, wu):
            return h + jnp.tanh(h @ wu[0]) @ wu[1], None

        return lax.scan(layer, jnp.sin(x), (p["w"], p["u"]))[0] @ p["head"]

    spec = infer(apply, variables, x)
    assert list(spec.sizes.values()) == [8, 8, 8]  # an inner permutation for each of the three
    assert change(apply, variables, x, spec) < 1e-5


def test_symmetries_among_parameters_alone():
    variables = {k: RNG.normal(size=(4, 3)).astype(np.float32) for k in ("a", "b", "summed")}

    def apply(p, x):
        return x @ (p["a"] @ p["b"].T) * jnp.exp(p["summed"].sum(0)).mean()

    x = RNG.normal(size=(2, 4)).astype(np.float32)
    spec = infer(apply, variables, x)
    places = [{(a.path, a.axis) for a in axes} for axes in spec.groups.values()]
    assert {("a", 1), ("b", 1)} in places  # the rank of a low-rank kernel
    assert {("summed", 0)} in places and {("summed", 1)} in places
    assert change(apply, variables, x, spec) < 1e-5


def test_tied_embedding_and_unused_leaf():
    variables = {"table": jnp.ones((7, 4)), "unused": jnp.ones((3,)), "key": jax.random.key(0)}

    def apply(p, ids):
        return jnp.tanh(p["table"][ids]) @ p["table"].T

    spec = infer(apply, variables, jnp.arange(5))
    assert {n: [tuple(a)[:5] for a in axes] for n, axes in spec.groups.items()} == {
        "table": [("table", 1, "in", 1, 1)]
    }
    assert ("unused", 0, "unused", "") in spec.fixed


def test_fixed_axes_say_where():
    def apply(p, x):
        h = x @ p["w"]
        return lax.rev(h, (1,)) @ p["v"]

    line = apply.__code__.co_firstlineno + 2
    spec = infer(apply, {"w": jnp.ones((4, 6)), "v": jnp.ones((6, 3))}, jnp.ones((5, 4)))
    entries = {(f.path, f.axis): tuple(f[2:]) for f in spec.fixed}
    assert entries["w", 1] == ("rev", f"test_rules.py:{line}")
    assert entries["w", 0] == ("input", f"test_rules.py:{line - 1}")


def test_what_has_no_rule_or_a_broken_one_is_fixed(monkeypatch):
    def callback(h):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(h.shape, h.dtype), h)

    apply, variables, x = network(callback, N)
    spec = infer(apply, variables, x)
    assert not spec.groups
    assert "pure_callback" in {f.primitive for f in spec.fixed}

    apply, variables, x = network(jnp.sin, N)
    for broken in (lambda step: step.params["renamed"], lambda step: [[]], lambda step: []):
        monkeypatch.setitem(RULES, "sin", broken)
        spec = infer(apply, variables, x)
        assert not spec.groups
        assert ("w", 1, "sin") in {f[:3] for f in spec.fixed}


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match="two rules for the primitive 'add'"):
        rule("add")(lambda step: [])


def test_constants_of_a_surrounding_trace_are_fixed():
    apply, variables, x = network(lambda h: h, N)

    def outer(scale):
        return len(infer(lambda p, x: apply(p, x * 1) * 1 + 0 * scale.sum(), variables, x).groups)

    assert outer(jnp.ones(6)) == 1
    seen = []
    jax.jit(lambda s: seen.append(infer(lambda p, x: (x @ p["w"] * s) @ p["v"], variables, x)))(
        jnp.ones((5, 6))
    )
    assert not seen[0].groups


def test_algebra_refines_products():
    algebra, cause = Algebra(), Cause("test")
    whole, a, b = algebra.atom(12), algebra.atom(3), algebra.atom(4)
    algebra.unify([whole], [a, b], cause)
    high, low = algebra.expand([whole])
    assert (algebra.find(high), algebra.find(low)) == (algebra.find(a), algebra.find(b))
    # Atoms keep their identity though they are tied.
    assert {high, low}.isdisjoint({a, b})
    other = algebra.atom(12)
    algebra.unify([other], [algebra.atom(6), algebra.atom(2)], cause)
    algebra.unify([other], [whole], cause)  # (6, 2) against (3, 4): common refinement (3, 2, 2)
    assert [algebra.size(k) for k in algebra.expand([whole])] == [3, 2, 2]
    assert all(algebra.cause(k) is None for k in algebra.expand([whole]))
    algebra.unify([algebra.atom(4), algebra.atom(3)], [whole], cause)  # (4, 3): none is left
    assert any(algebra.cause(k) == cause for k in algebra.expand([whole]))


@pytest.mark.parametrize("loop", ["scan", "fori"])
def test_a_carry_that_begins_flat_does_not_stay_so(loop):
    """What was broadcast into a loop varies after its first step: its readers tie its axis."""

    def step(h, p):
        return h * p["s"][None] + jnp.sin(h[:, ::-1])

    def apply(p, x):
        h = jnp.broadcast_to((x @ p["w"])[:, :1], (3, 4))
        if loop == "scan":
            h = jax.lax.scan(lambda h, _: (step(h, p), None), h, None, length=100)[0]
        else:
            h = jax.lax.fori_loop(0, 3, lambda _, h: step(h, p), h)
        return h @ p["v"]

    rng = np.random.default_rng(0)
    shapes = {"w": (5, 2), "s": (4,), "v": (4, 2)}
    tree = {k: rng.normal(size=n).astype(np.float32) for k, n in shapes.items()}
    net = vfjax.trace(apply, tree, np.ones((3, 5), np.float32))
    assert not any(axis.path in "sv" for axes in net.spec.groups.values() for axis in axes)
