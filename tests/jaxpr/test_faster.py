"""Equivalents of slow operations: the same values and the same gradients."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from vfjax import models
from vfjax._jaxpr import routed


def primitives(fn, *args):
    found = []

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.append((eqn.primitive.name, [v.aval.shape for v in eqn.invars]))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
            ):
                if hasattr(inner, "eqns"):
                    walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(fn)(*args).jaxpr)
    return found


def names(fn, *args):
    return [name for name, _ in primitives(fn, *args)]


def draw(shape, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(-5, 5, shape), dtype)
    return jnp.asarray(rng.standard_normal(shape), dtype)


# Sums of at most 4 * 9 * 3 products in another order: a few float32 roundings of their size.
def close(a, b, rtol=1e-5):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (1e-6 + float(jnp.abs(b).max())))


LAYOUTS = {
    "NHWC": ("NHWC", "HWIO", "NHWC"),
    "NCHW": ("NCHW", "OIHW", "NCHW"),
    "mixed": ("NCHW", "HWIO", "NHWC"),
}
CASES = list(itertools.product(
    [(1, 1), (1, 2), (2, 2)], [(3, 3), (2, 1)], ["SAME", ((1, 1), (1, 1)), ((2, 0), (0, 1))],
    [(1, 1), (2, 1)], [(1, 1), (1, 2)],
))[::5]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_on_tiny_maps(layout):
    spec = LAYOUTS[layout]

    def shaped(order, **sizes):
        return tuple(sizes[letter] for letter in order)

    count = 0
    for k, (size, window, padding, stride, dilation) in enumerate(CASES):
        x = draw(shaped(spec[0], N=3, C=2, H=size[0], W=size[1]), seed=k)
        w = draw(shaped(spec[1], O=4, I=2, H=window[0], W=window[1]), seed=k + 1)

        def conv(x, w, args=(stride, padding), dilation=dilation):
            return lax.conv_general_dilated(
                x, w, *args, rhs_dilation=dilation, dimension_numbers=spec
            )

        if 0 in jax.eval_shape(conv, x, w).shape:
            continue
        ours, theirs = jax.jit(lambda x, w, f=conv: (routed(f)(x, w), f(x, w)))(x, w)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        close(ours, theirs)
        count += "conv_general_dilated" not in names(routed(conv), x, w)
    assert count > 6


def conv3(x, w):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_gradients_vmap_and_jit_of_routed_convolutions():
    x, w = draw((3, 2, 2, 2)), draw((3, 3, 2, 4))
    target = draw((3, 2, 2, 4), seed=5)
    loss = lambda fn: lambda x, w: (fn(x, w) * target).sum()  # noqa: E731
    for a, b in zip(
        jax.jit(jax.grad(loss(routed(conv3)), (0, 1)))(x, w),
        jax.jit(jax.grad(loss(conv3), (0, 1)))(x, w),
        strict=True,
    ):
        close(a, b)
    xs, ws = draw((2, 3, 2, 2, 2)), draw((2, 3, 3, 2, 4))
    close(jax.jit(jax.vmap(routed(conv3)))(xs, ws), jax.vmap(conv3)(xs, ws))
    assert "conv_general_dilated" not in names(jax.vmap(routed(conv3)), xs, ws)


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    x, w = draw((batch, 2, 2, 2)), draw((3, 3, 2, 4))
    close(routed(conv3)(x, w), conv3(x, w)) if batch else None
    assert routed(conv3)(x, w).shape == (batch, 2, 2, 4)


def test_what_a_dense_layer_cannot_do_stays_a_convolution():
    x, w = draw((2, 2, 2, 4)), draw((3, 3, 2, 4))
    dims = ("NHWC", "HWIO", "NHWC")
    grouped = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=dims, feature_group_count=2
    )
    assert "conv_general_dilated" in names(routed(grouped), x, w)
    close(routed(grouped)(x, w), grouped(x, w))
    large = draw((2, 8, 8, 2))
    assert "conv_general_dilated" in names(routed(conv3), large, w)
    dilated = lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME")  # noqa: E731
    x, w = draw((2, 1, 1, 2)), draw((3, 3, 2, 4))
    close(routed(dilated)(x, w), dilated(x, w))


def depthwise(spec, stride, padding, dilation, groups):
    return lambda x, w: lax.conv_general_dilated(
        x,
        w,
        stride,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=spec,
        feature_group_count=groups,
    )


@pytest.mark.parametrize("batch", [4, 16], ids=["sums", "matrices"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_depthwise_convolutions(layout, batch):
    """Values and gradients; sums of 49 products at most, and of 16 * 30 in gradients."""
    spec = LAYOUTS[layout]

    def shaped(order, **sizes):
        return tuple(sizes[letter] for letter in order)

    for k, (size, window, stride, padding, dilation) in enumerate([
        ((6, 5), (7, 7), (1, 1), ((3, 3), (3, 3)), (1, 1)),
        ((6, 5), (3, 2), (2, 1), "SAME", (1, 1)),
        ((5, 6), (3, 3), (1, 2), ((2, -1), (0, 1)), (1, 2)),
        ((1, 1), (3, 3), (1, 1), "SAME", (1, 1)),
    ]):  # fmt: skip
        x = draw(shaped(spec[0], N=batch, C=3, H=size[0], W=size[1]), seed=k)
        w = draw(shaped(spec[1], O=3, I=1, H=window[0], W=window[1]), seed=k + 1)
        conv = depthwise(spec, stride, padding, dilation, 3)
        found = names(routed(conv), x, w)
        assert "conv_general_dilated" not in found
        assert ("dot_general" in found) == (batch == 16 or size == (1, 1))
        weights = draw(jax.eval_shape(conv, x, w).shape, seed=k + 2)

        def both(fn, x, w, weights=weights):
            loss = lambda x, w: (fn(x, w) * weights).sum()  # noqa: E731
            return fn(x, w), *jax.grad(loss, (0, 1))(x, w)

        run = jax.jit(lambda x, w, c=conv, b=both: (b(routed(c), x, w), b(c, x, w)))
        for ours, theirs in zip(*run(x, w), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            close(ours, theirs)


def test_depthwise_convolutions_of_other_kinds():
    spec, pad = LAYOUTS["NHWC"], ((3, 3), (3, 3))
    one = depthwise(spec, (1, 1), pad, (1, 1), 4)
    x, w = draw((2, 4, 4, 4), jnp.bfloat16), draw((7, 7, 1, 4), jnp.bfloat16)
    ours, exact = routed(one)(x, w), one(x.astype("float32"), w.astype("float32"))
    assert ours.dtype == jnp.bfloat16
    # Summed in float32 and rounded once.
    close(ours.astype("float32"), exact, rtol=2**-8)
    x, w = draw((2, 4, 4, 4), jnp.int32), draw((7, 7, 1, 4), jnp.int32)
    assert jnp.array_equal(routed(one)(x, w), one(x, w))
    x, w = draw((8, 4, 4, 4), jnp.int32), draw((7, 7, 1, 4), jnp.int32)
    assert jnp.array_equal(routed(one)(x, w), one(x, w))
    x, w = draw((8, 4, 4, 4), jnp.bfloat16), draw((7, 7, 1, 4), jnp.bfloat16)
    close(routed(one)(x, w).astype("float32"), one(*map(jnp.float32, (x, w))), rtol=2**-8)
    # Two outputs for each channel, and kernels of very many taps, stay as they are.
    assert "conv_general_dilated" in names(routed(one), draw((2, 4, 4, 4)), draw((7, 7, 1, 8)))
    assert "conv_general_dilated" in names(routed(one), draw((2, 4, 4, 4)), draw((9, 9, 1, 4)))
    xs, ws = draw((2, 3, 5, 5, 4)), draw((2, 7, 7, 1, 4))
    close(jax.jit(jax.vmap(routed(one)))(xs, ws), jax.vmap(one)(xs, ws))


def test_precision_and_dtypes_are_kept():
    x, w = draw((2, 2, 2, 2), jnp.bfloat16), draw((3, 3, 2, 4), jnp.bfloat16)
    highest = lambda x, w: lax.conv_general_dilated(  # noqa: E731
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    jaxpr = jax.make_jaxpr(routed(highest))(x, w)
    found = [e.params["precision"] for e in jaxpr.jaxpr.eqns if e.primitive.name == "dot_general"]
    assert all(p is not None for p in found) and len(found) == 1
    assert routed(highest)(x, w).dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits, and partial sums are rounded in another order.
    close(routed(highest)(x, w).astype("float32"), highest(x, w).astype("float32"), rtol=0.05)
    x, w = draw((2, 2, 2, 2), jnp.int32), draw((3, 3, 2, 4), jnp.int32)
    assert jnp.array_equal(routed(conv3)(x, w), conv3(x, w))


def max_pool(x, window=(1, 2, 2, 1), strides=None, padding="VALID"):
    init = -np.inf if jnp.issubdtype(x.dtype, jnp.floating) else np.iinfo(x.dtype).min
    init = np.asarray(init, x.dtype)
    return lax.reduce_window(x, init, lax.max, window, strides or window, padding)


def sum_pool(x, window=(1, 2, 2, 1), strides=None, padding="VALID"):
    zero = np.zeros((), x.dtype)
    return lax.reduce_window(x, zero, lax.add, window, strides or window, padding)


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (2, 3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
def test_pools(size, dtype):
    x = draw((2, *size, 3), dtype)
    for window in ((1, 2, 2, 1), (1, 2, 1, 1), (1, 1, 3, 1)):
        ours = routed(lambda x, w=window: max_pool(x, w))
        assert jnp.array_equal(ours(x), max_pool(x, window))
        summed = routed(lambda x, w=window: sum_pool(x, w))(x)
        # Four terms; bfloat16 rounds each partial sum to 8 bits.
        rtol = 0.03 if dtype == jnp.bfloat16 else 1e-6
        close(summed.astype("float32"), sum_pool(x, window).astype("float32"), rtol)
    assert not any("reduce_window" in n for n in names(routed(max_pool), x))


def test_pools_of_channels_first_and_of_three_axes():
    x = draw((2, 3, 4, 6))
    window = (1, 1, 2, 3)
    assert jnp.array_equal(routed(lambda x: max_pool(x, window))(x), max_pool(x, window))
    x, window = draw((2, 4, 2, 6, 3)), (1, 2, 2, 2, 1)
    assert jnp.array_equal(routed(lambda x: max_pool(x, window))(x), max_pool(x, window))


@pytest.mark.parametrize("padding", ["SAME", ((0, 0), (1, 1), (0, 0), (0, 0))])
def test_pools_that_do_not_tile(padding):
    x = draw((2, 5, 5, 3))
    for window, strides in (((1, 2, 2, 1), None), ((1, 3, 3, 1), (1, 2, 2, 1))):
        fn = lambda x, a=(window, strides): max_pool(x, *a, padding)  # noqa: E731
        assert jnp.array_equal(routed(fn)(x), fn(x))


def test_pools_keep_infinity_and_nan():
    x = draw((1, 4, 4, 1))
    x = x.at[0, 0, 0, 0].set(jnp.nan).at[0, 1, 3, 0].set(jnp.nan).at[0, 2:, 2:, 0].set(-jnp.inf)
    assert jnp.array_equal(routed(max_pool)(x), max_pool(x), equal_nan=True)


def test_gradients_of_pools_agree_at_ties():
    # Every pattern of ties in a 2x2 window: the first maximum takes the gradient.
    patterns = list(itertools.product((0.0, 1.0), repeat=4))
    x = jnp.asarray(patterns).reshape(-1, 2, 2, 1)
    weight = jnp.arange(1.0, 1 + len(patterns)).reshape(-1, 1, 1, 1)
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: (f(x) * weight).sum()))(x)
        for f in (routed(max_pool), max_pool)
    )
    assert jnp.array_equal(ours, theirs)
    x = draw((2, 5, 4, 3))
    ours, theirs = (
        jax.jit(jax.grad(lambda x, f=f: (f(x) ** 2).sum()))(x) for f in (routed(sum_pool), sum_pool)
    )
    close(ours, theirs)


def test_outputs_of_any_form():
    def fn(tree, x):
        return {"x": x, "one": 1, "sum": tree["a"] + x, "none": None}, (x,)

    out = routed(fn)({"a": jnp.ones(2)}, jnp.ones(2))
    assert jax.tree.structure(out) == jax.tree.structure(fn({"a": 1}, 1))
    assert out[0]["one"].dtype == jnp.int32 and float(out[0]["sum"][0]) == 2


def test_a_routed_vgg_has_no_slow_convolution_and_its_trace_is_plain():
    model = models.create("vgg11", width=1 / 32)
    x = draw((2, 32, 32, 3))
    variables = model.init(jax.random.key(0), x)
    apply = models.apply_fn(model)
    net = vfjax.trace(apply, variables, x)

    def slow(fn):
        return [
            name
            for name, shapes in primitives(fn, variables, x)
            if "reduce_window" in name or (name.startswith("conv") and shapes[0][1:3] == (2, 2))
        ]

    assert slow(apply) and not slow(routed(apply)) and not slow(net.run)
    assert sum(layer.kind == "conv" for layer in net.layers) == 8
    ours, theirs = jax.jit(net.run)(variables, x), jax.jit(apply)(variables, x)
    close(ours, theirs, rtol=1e-4)  # eight layers, float32


def test_other_backends_keep_their_operations(monkeypatch):
    x, w = draw((2, 2, 2, 2)), draw((3, 3, 2, 4))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert names(routed(conv3), x, w) == names(conv3, x, w)
    assert names(routed(max_pool), x) == names(max_pool, x)
