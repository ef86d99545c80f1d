"""What lies between a leaf and its layer and only hands it on hides neither from the other."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import close
from vfjax._jaxpr.primitives import CAST
from vfjax.symmetry import check_spec

RNG = np.random.default_rng(0)


def mesh():
    return jax.make_mesh((1,), ("d",))


def resharded(a):
    sharding = NamedSharding(jax.make_mesh((1,), ("d",), (AxisType.Explicit,)), PartitionSpec())
    return jax.reshard(a, sharding)


CASTS = {
    "convert_element_type": lambda a: a.astype(jnp.bfloat16).astype(jnp.float32),
    "copy": jnp.copy,
    "device_put": jax.device_put,
    "layout_constraint": lambda a: with_layout_constraint(a, Layout(tuple(range(a.ndim)))),
    "name": lambda a: checkpoint_name(a, "leaf"),
    "optimization_barrier": lax.optimization_barrier,
    "reduce_precision": lambda a: lax.reduce_precision(a, 8, 20),
    "reshard": resharded,
    "sharding_constraint": lambda a: lax.with_sharding_constraint(
        a, NamedSharding(mesh(), PartitionSpec())
    ),
    "stop_gradient": lax.stop_gradient,
}
# Only inside `shard_map`, of one version of jax, or on devices with several memories.
UNREACHED = {"pvary", "relayout", "with_memory_space_constraint"}


def leaves(**shapes):
    return {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in shapes.items()}


VARIABLES = leaves(w=(4, 6), b=(6,), v=(6, 3), c=(3,))
NORMED = leaves(w=(4, 6), mean=(6,), scale=(6,), bias=(6,), v=(6, 3)) | {
    "var": jnp.arange(1.0, 7.0)
}
X = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)


def mlp(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None]) @ p["v"] + p["c"][None]


def normed(p, x):
    z = (x @ p["w"] - p["mean"][None]) * lax.rsqrt(p["var"] + 1e-3)[None] * p["scale"][None] + p[
        "bias"
    ][None]
    return jnp.tanh(z) @ p["v"]


def each(cast):
    return lambda fn: lambda p, x: fn({k: cast(a) for k, a in p.items()}, x)


def of_tree(cast):
    return lambda fn: lambda p, x: fn(cast(p), x)


def with_input(p, x):
    p, x = lax.optimization_barrier((p, x))
    return mlp(p, x)


WAYS = {name: each(cast) for name, cast in CASTS.items()} | {
    "all placed at once": of_tree(jax.device_put),
    "all behind one barrier": of_tree(lax.optimization_barrier),
    "with the input": lambda fn: lambda p, x: fn(*lax.optimization_barrier((p, x))),
    "placed in a call": of_tree(jax.jit(lambda p: jax.device_put(p))),
}


def test_all_casts_are_covered():
    assert CASTS.keys() | UNREACHED == CAST
    for name, cast in CASTS.items():
        assert name in {e.primitive.name for e in jax.make_jaxpr(cast)(X).eqns}


@pytest.mark.parametrize("way", WAYS)
def test_layers_behind_casts(way):
    net, plain = (vfjax.trace(f, VARIABLES, X) for f in (WAYS[way](mlp), mlp))
    assert [(a.name, a.kernel, a.bias) for a in net.layers] == [("w", "w", "b"), ("v", "v", "c")]
    assert [(a.name, a.channel_axes, a.group) for a in net.layers] == [
        (a.name, a.channel_axes, a.group) for a in plain.layers
    ]
    assert net.spec.groups == plain.spec.groups and net.spec.groups
    assert (net.spec.scaling, net.spec.rigid) == (plain.spec.scaling, plain.spec.rigid)
    assert net.others == plain.others
    assert check_spec(net, VARIABLES, X, key=jax.random.key(0)) < 1e-2  # of bfloat16, say


@pytest.mark.parametrize("way", WAYS)
def test_folding_behind_casts(way):
    net = vfjax.trace(WAYS[way](mlp), VARIABLES, X)
    scale, shift = jnp.float32(RNG.uniform(0.5, 2, 6)), jnp.float32(RNG.normal(size=6))
    assert net.can_fold("w", shift=False) and net.can_fold("w", shift=True)
    folded = net.fold(VARIABLES, "w", scale, shift)
    expected = net.run(VARIABLES, X, edit={"w": lambda z: z * scale[None] + shift[None]})
    rtol = 0.05 if way == "convert_element_type" else 1e-5  # leaves are rounded anew
    np.testing.assert_allclose(net.run(folded, X), expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("way", WAYS)
def test_norms_behind_casts(way):
    net, plain = (vfjax.trace(f, NORMED, X) for f in (WAYS[way](normed), normed))
    (norm,) = net.norms
    assert norm == plain.norms[0]
    assert (norm.mean, norm.var, norm.scale, norm.bias) == ("mean", "var", "scale", "bias")
    assert norm.layer == "w" and net.can_fold("w", shift=True)
    assert net.spec.groups == plain.spec.groups


@pytest.mark.parametrize("name", CASTS)
def test_values_behind_casts(name):
    """Between a layer, its bias, its norm and its activation casts hide nothing either."""
    cast = CASTS[name]

    def fn(p, x):
        z = cast(cast(x @ p["w"]) - p["mean"][None])
        return (
            jnp.tanh(
                cast(cast(z * lax.rsqrt(p["var"] + 1e-3)[None]) * p["scale"][None])
                + p["bias"][None]
            )
            @ p["v"]
        )

    net, plain = (vfjax.trace(f, NORMED, X) for f in (fn, normed))
    assert net.norms == plain.norms
    assert [(a.name, a.norm) for a in net.layers] == [(a.name, a.norm) for a in plain.layers]
    assert net.spec.groups == plain.spec.groups


def test_a_cast_of_several_runs_one_by_one():
    """A kernel behind a barrier with the input needs no input."""
    net = vfjax.trace(with_input, VARIABLES, X)
    close(net.run(VARIABLES, X), mlp(VARIABLES, X))
    assert net.stem_leaves(1) == frozenset({"w", "b"})


def test_stacked_layers_taken_apart():
    """Layers of one leaf, as a loop over it, over its entries and over slices has them."""
    variables = leaves(w=(3, 4, 4))

    def entries(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x

    def unstacked(p, x):
        for w in jnp.unstack(jax.device_put(p["w"])):
            x = jnp.tanh(x @ w)
        return x

    def indexed(p, x):
        for k in range(3):
            x = jnp.tanh(x @ p["w"][k])
        return x

    nets = [vfjax.trace(fn, variables, X) for fn in (entries, unstacked, indexed)]
    for net in nets:
        assert [a.name for a in net.layers] == ["w[0]", "w[1]", "w[2]"]
        assert all(a.kernel == "w" and net.can_fold(a.name, shift=False) for a in net.layers)
        assert net.spec.groups == nets[-1].spec.groups
        wheres = {f.where for f in net.spec.fixed}
        assert wheres and all(at.startswith("test_casts.py:") for at in wheres)
        close(net.run(variables, X), entries(variables, X))


def test_integers_stay_what_they_are():
    """A cast of a leaf of integers is seen, and not folded into."""

    def fn(p, x):
        return x @ jax.device_put(p["w"]).astype(jnp.float32)

    net = vfjax.trace(fn, {"w": jnp.ones((4, 6), jnp.int8)}, X)
    assert net.layers[0].kernel == "w" and not net.can_fold("w", shift=False)


def test_flax_behind_a_barrier():
    model = nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Conv(2, (1, 1))])
    x = jnp.ones((2, 5, 5, 3))
    variables = model.init(jax.random.key(0), x)
    plain = vfjax.trace(model.apply, variables, x)
    net = vfjax.trace(lambda v, x: model.apply(lax.optimization_barrier(v), x), variables, x)
    assert [a.kernel for a in net.layers] == [a.kernel for a in plain.layers]
    assert net.spec.groups == plain.spec.groups
