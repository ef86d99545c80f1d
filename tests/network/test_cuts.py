"""Cutting a network at a depth: stem, crossing, trunk, and what each side reads."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import normal
from vfjax import Crossing

IMAGES = normal(7, 4, 6, 6, 3)
ROWS = normal(8, 4, 3)


def draw(tree, seed=0):
    def leaf(path, a):
        name = jax.tree_util.keystr(path)
        noise = np.random.default_rng([seed, sum(name.encode())]).standard_normal(a.shape)
        return jnp.asarray(abs(noise) + 0.5 if "var" in name else noise, a.dtype)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def close(a, b, rtol=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * abs(b).max(initial=0))


def mean(trees):
    return jax.tree.map(lambda *a: sum(a) / len(a), *trees)


class Chain(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(4, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(5, (3, 3))(x)))
        return nn.Dense(3)(nn.relu(nn.Dense(6)(x.mean((1, 2)))))


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True)(x)  # noqa: E731
        x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
        for width, stride in ((4, 1), (6, 2)):
            y = nn.relu(norm(nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)))
            y = norm(nn.Conv(width, (3, 3), use_bias=False)(y))
            if stride > 1:
                x = norm(nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1, x.shape[-1]))
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 6))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(y, y)
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


MODELS = {"chain": Chain, "residual": Residual, "transformer": Transformer}


@pytest.fixture(params=MODELS)
def case(request):
    model = MODELS[request.param]()
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    trees = [draw(shapes, seed) for seed in range(3)]
    return request.param, vfjax.trace(model.apply, shapes, IMAGES), model.apply, trees


def preserve(net, trees, depth, x, weights=None):
    """The first layers per model, the rest averaged."""
    crossings = [net.run(t, x, stop=depth) for t in trees]
    return net.run(mean(trees), net.average_crossings(crossings, weights), start=depth)


def test_the_two_sides_make_the_network(case):
    _, net, apply, (tree, *_) = case
    expected = jax.jit(apply)(tree, IMAGES)

    @jax.jit
    def both(tree, x):
        return [net.run(tree, net.run(tree, x, stop=k), start=k) for k in range(net.depth + 1)]

    for out in both(tree, IMAGES):
        close(out, expected)


def test_limits(case):
    name, net, apply, trees = case
    apply = jax.jit(apply)
    outs = jax.jit(lambda trees, x: [preserve(net, trees, k, x) for k in (0, 1, net.depth)])(
        trees, IMAGES
    )
    averaged = apply(mean(trees), IMAGES)
    close(outs[0], averaged)
    close(outs[2], sum(apply(t, IMAGES) for t in trees) / 3)
    if name == "chain":  # the first layer is affine, so averaging before or after it is the same
        close(outs[1], averaged)


def test_a_chain_crosses_in_one_pre_activation():
    model = Chain()
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    net, tree = vfjax.trace(model.apply, shapes, IMAGES), draw(shapes)
    for depth, layer in enumerate(net.layers, 1):
        crossing, found = net.run(tree, IMAGES, stop=depth, capture=[layer.name])
        (value,) = crossing.values
        close(value, found[layer.name])
        assert crossing.depth == depth
    (value,) = net.run(tree, IMAGES, stop=0).values
    assert jnp.array_equal(value, IMAGES)


def test_a_residual_block_crosses_with_its_stream():
    model = Residual()
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    net, tree = vfjax.trace(model.apply, shapes, IMAGES), draw(shapes)
    sizes = [len(net.run(tree, IMAGES, stop=k).values) for k in range(net.depth + 1)]
    # Inside a block, the pre-activation and the stream; at its end as well, the join comes after.
    assert sizes == [1, 1, 2, 2, 2, 2, 1]
    by_depth = {x.depth: x for x in net.layers if x.main}
    shortcut = next(x for x in net.layers if not x.main)
    # A shortcut runs with what reads it: behind the last layer of its block.
    assert not net.in_stem(shortcut.name, 5) and net.in_stem(shortcut.name, 6)
    assert net.in_stem(by_depth[5].name, 5) and not net.in_stem(by_depth[5].name, 4)
    # The norm after the cut layer belongs to the trunk.
    for norm in net.norms:
        if norm.layer == by_depth[3].name:
            assert not net.in_stem(norm.site, 3) and net.in_stem(norm.site, 4)
    assert net.in_stem("input", 0) and not net.in_stem("output", 6)


def test_each_side_reads_its_leaves_and_no_other(case):
    _, net, _, (tree, *_) = case
    named = dict(zip(net.paths, jax.tree.leaves(tree), strict=True))
    structure = jax.tree.structure(tree)

    def only(paths):
        return jax.tree.unflatten(structure, [named[p] if p in paths else None for p in named])

    for depth in range(net.depth + 1):
        stem, trunk = net.stem_leaves(depth), net.trunk_leaves(depth)
        assert stem | trunk == set(net.paths)
        shapes = jax.eval_shape(lambda v, d=depth: net.run(v, IMAGES, stop=d), only(stem))
        jax.eval_shape(lambda v, c, d=depth: net.run(v, c, start=d), only(trunk), shapes)
        # Each of them is read: without it the run fails, and says what it lacks.
        for side, how in ((stem, {"stop": depth}), (trunk, {"start": depth})):
            for path in sorted(side)[:2]:
                x = IMAGES if "stop" in how else jax.tree.map(jnp.zeros_like, shapes)
                with pytest.raises(ValueError, match=rf"variables lacks \['{path}'"):
                    net.run(only(side - {path}), x, **how)


def test_crossings_are_sliced_and_joined_along_the_batch(case):
    _, net, _, (tree, *_) = case
    expected = jax.jit(net.run)(tree, IMAGES)
    depth = net.depth // 2
    crossing = jax.jit(lambda v, x: net.run(v, x, stop=depth))(tree, IMAGES)
    behind = jax.jit(lambda v, c: net.run(v, c, start=depth))
    close(behind(tree, jax.tree.map(lambda v: v[1:3], crossing)), expected[1:3])
    joined = jax.tree.map(lambda v: jnp.concatenate([v, v, v]), crossing)
    close(behind(tree, joined), jnp.concatenate([expected] * 3))


def test_crossings_keep_what_input_they_came_of():
    # Without the size of the map, the trunk could not know what to divide by.
    def fn(p, x):
        z = (x @ p["a"]).sum((1, 2))
        return (z / (x.shape[1] * x.shape[2])) @ p["b"]

    p = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 2))}
    net = vfjax.trace(fn, p, IMAGES)
    small = IMAGES[:, :2, :4]
    for x in (IMAGES, small, IMAGES.astype("float16")):
        close(net.run(p, net.run(p, x, stop=1), start=1), fn(p, x), 1e-2)
    (value,) = net.run(p, small, stop=1).values
    with pytest.raises(ValueError, match="belong to no batch of the traced input"):
        net.run(p, Crossing((value,), 1), start=1)


@pytest.mark.parametrize("batch_axis", [0, 1])
def test_time_major_networks(batch_axis):
    def fn(p, x):
        x = jnp.swapaxes(x, 0, 1)  # (time, batch, features)
        x = jnp.tanh(x @ p["a"]) / x.shape[1]
        return jnp.tanh(x @ p["b"])[-1] @ p["c"]

    p = {k: v for k, v in zip("abc", draw(dict.fromkeys("abc", jnp.ones((3, 3)))).values())}  # noqa: B905
    x = normal(0, 4, 5, 3)
    net = vfjax.trace(fn, p, x)
    for size in (4, 2):
        close(net.run(p, net.run(p, x[:size], stop=2), start=2), fn(p, x[:size]))
    crossing = net.run(p, x, stop=2)
    (value,) = crossing.values
    assert value.shape == (5, 4, 3)
    # It is cut along its batch, wherever that is; a cut along time fits no input.
    if batch_axis:
        half = jax.tree.map(lambda v: v[:, :2], crossing)
        assert net.run(p, half, start=2).shape == (2, 3)
    else:
        with pytest.raises(ValueError, match="belong to no batch"):
            net.run(p, jax.tree.map(lambda v: v[:2], crossing), start=2)


def test_values_of_the_input_alone_are_passed_on():
    def fn(p, x):
        return jnp.tanh(x["a"] @ p["a"]) @ p["b"] + jnp.sin(x["a"]) * x["n"][:, None]

    p = draw({"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))})
    x = {"a": ROWS, "n": jnp.arange(4)}
    net = vfjax.trace(fn, p, x)
    crossings = [net.run(t, x, stop=1) for t in (p, draw(p, 1))]
    found = net.average_crossings(crossings, [0.25, 0.75])
    # The integers are not averaged: they depend on no parameter.
    assert [v.dtype for v in found.values] == [jnp.float32, jnp.int32, jnp.float32]
    assert found.values[1] is crossings[0].values[1]
    pre = [c.values[2] for c in crossings]
    close(found.values[2], 0.25 * pre[0] + 0.75 * pre[1])
    close(net.run(p, net.run(p, x, stop=1), start=1), fn(p, x))


def test_averages_are_taken_in_float32():
    p = jnp.ones((3, 3), "bfloat16")
    net = vfjax.trace(lambda p, x: jnp.tanh(x @ p), p, ROWS.astype("bfloat16"))
    values = [1.0, 1.0 + 2**-7, 1.0 + 2**-6]
    crossings = [Crossing((jnp.full((4, 3), v, "bfloat16"),), 1) for v in values]
    (found,) = net.average_crossings(crossings).values
    assert found.dtype == jnp.bfloat16 and float(found[0, 0]) == 1 + 2**-7


def test_integers_that_depend_on_parameters_have_no_average():
    def fn(p, x):
        z = x @ p["a"]  # the pre-activation of depth 1; its argmax is read at depth 2
        return (jnp.tanh(z) @ p["b"]) * z.argmax(-1)[:, None]

    p = draw({"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))})
    net = vfjax.trace(fn, p, ROWS)
    c = net.run(p, ROWS, stop=1)  # the trunk makes the argmax itself, of the averaged z
    close(net.run(p, net.average_crossings([c, c]), start=1), fn(p, ROWS))

    def routing(p, x):
        best = (x @ p["a"]).argmax(-1)  # made in the stem of depth 2, used behind it
        return (jax.nn.one_hot(best, 3) @ p["b"]) * best[:, None]

    net = vfjax.trace(routing, p, ROWS)
    c = net.run(p, ROWS, stop=2)
    with pytest.raises(ValueError, match="dtype int32 that depends on parameters.*depth 2"):
        net.average_crossings([c, c])
    close(net.run(p, c, start=2), routing(p, ROWS))


def test_parameter_only_equations_run_where_they_are_used():
    def fn(p, x):
        gain = jnp.exp(p["gain"])[None]
        return jnp.tanh(x @ p["a"] * gain) @ p["b"] * gain

    p = draw({"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3)), "gain": jnp.ones(3)})
    net = vfjax.trace(fn, p, ROWS)
    assert net.stem_leaves(2) == {"a", "b", "gain"} and net.trunk_leaves(2) == {"gain"}
    assert net.stem_leaves(1) == {"a"} and net.trunk_leaves(1) == {"b", "gain"}
    assert net.stem_leaves(0) == frozenset() and net.trunk_leaves(0) == set(p)
    assert net.stem_params(2) + net.trunk_params(2) == net.params + 3
    c = net.run({**p, "gain": None}, ROWS, stop=1)
    close(net.run({**p, "a": None}, c, start=1), fn(p, ROWS))


def test_scan_slices_are_read_as_one_leaf():
    def fn(p, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]

    p = draw(jnp.ones((3, 3, 3)))
    net = vfjax.trace(fn, p, ROWS)
    for depth in range(4):
        close(net.run(p, net.run(p, ROWS, stop=depth), start=depth), fn(p, ROWS))


def test_sites_of_each_side():
    model = Residual()
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    net, tree = vfjax.trace(model.apply, shapes, IMAGES), draw(shapes)
    depth = 3
    cut = next(x for x in net.layers if x.main and x.depth == depth)
    double = {cut.name: lambda z: 2 * z}
    expected, found = net.run(tree, IMAGES, edit=double, capture=[cut.name])
    # The pre-activation at the cut is there on both sides, to be read and replaced.
    stem = net.run(tree, IMAGES, stop=depth, edit=double)
    close(net.run(tree, stem, start=depth), expected)
    plain = net.run(tree, IMAGES, stop=depth)
    out, again = net.run(tree, plain, start=depth, edit=double, capture=[cut.name, "output"])
    close(out, expected)
    close(again[cut.name], found[cut.name])
    norm = next(n for n in net.norms if n.layer == cut.name)
    _, seen = net.run(tree, plain, start=depth, capture=[norm.site, cut.tap])
    close(seen[norm.site], found[cut.name] / 2)
    for site, how, side in (
        (net.layers[0].name, {"start": depth}, "stem"),
        (net.layers[-1].tap, {"stop": depth}, "trunk"),
        (norm.site, {"stop": depth}, "trunk"),
        (cut.tap, {"stop": depth}, "trunk"),
        ("input", {"start": depth}, "stem"),
        ("output", {"stop": depth}, "trunk"),
    ):
        x = IMAGES if "stop" in how else plain
        for sites in ({"capture": [site]}, {"edit": {site: lambda v: v}}):
            with pytest.raises(ValueError, match=f"Site '{site}' lies in the {side}"):
                net.run(tree, x, **how, **sites)


def test_the_input_may_cross_and_be_the_output():
    net = vfjax.trace(lambda p, x: (x @ p @ p + x, x), jnp.eye(3), ROWS)
    c = net.run(jnp.eye(3), ROWS, stop=1)
    out, found = net.run(jnp.eye(3), c, start=1, capture=["input"])
    close(found["input"], ROWS)
    close(out[0], 2 * ROWS)
    close(out[1], ROWS)
    out = net.run(jnp.eye(3), c, start=1, edit={"input": lambda x: 0 * x})
    close(out[0], ROWS)


def test_bad_crossings():
    net = vfjax.trace(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], (jnp.eye(3), jnp.eye(3)), ROWS)
    p = (jnp.eye(3), jnp.eye(3))
    one, two = (net.run(p, ROWS, stop=k) for k in (1, 2))
    with pytest.raises(ValueError, match="it was a cut at 2"):
        net.run(p, two, start=1)
    with pytest.raises(ValueError, match="it was ArrayImpl|it was Array"):
        net.run(p, ROWS, start=1)
    with pytest.raises(ValueError, match="x is a Crossing.*start=1"):
        net.run(p, one)
    with pytest.raises(ValueError, match="stop was 1, before start, 2"):
        net.run(p, two, start=2, stop=1)
    with pytest.raises(ValueError, match="different cuts"):
        net.average_crossings([one, two])
    with pytest.raises(ValueError, match="different inputs"):
        net.average_crossings([one, net.run(p, ROWS[:2], stop=1)])
    with pytest.raises(ValueError, match="weights has 3 entries for 2"):
        net.average_crossings([one, one], [1, 2, 3])
    with pytest.raises(ValueError, match="weights must sum to one"):
        net.average_crossings([one, one], [0.5, 0.6])
    with pytest.raises(TypeError, match="weights must be a sequence"):
        net.average_crossings([one, one], 0.5)
    with pytest.raises(ValueError, match="crossings is empty"):
        net.average_crossings([])
    with pytest.raises(ValueError, match="crossings is empty"):
        net.average_crossings(iter([]))
    close(net.average_crossings(c for c in [one, one]).values[0], one.values[0])
    for call in (net.stem_leaves, net.trunk_leaves, net.stem_flops, net.trunk_params):
        with pytest.raises(ValueError, match="depth was 3"):
            call(3)
        with pytest.raises(TypeError, match="depth must be a whole number"):
            call(None)
