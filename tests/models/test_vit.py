"""Vision transformers: sizes, groups, invariance, cuts by blocks, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import merge, models, stats

SMALL = {"blocks": 2, "features": 12, "heads": 3, "patch": 4, "classes": 5}


@pytest.fixture(scope="module")
def small():
    """A network, and two trees of it whose leaves are all far from their initial constants."""
    model = models.create("vit", **SMALL)
    x = jnp.float32(np.random.default_rng(0).normal(size=(3, 8, 8, 3)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten(shapes)

    def tree(seed):
        rng = np.random.default_rng(seed)
        drawn = [jnp.float32(0.5 * rng.normal(size=leaf.shape)) for leaf in leaves]
        return jax.tree.unflatten(treedef, drawn)

    return vfjax.trace(models.apply_fn(model), shapes, x), [tree(1), tree(2)], x


@pytest.mark.parametrize(
    ("name", "side", "options", "expected"),
    [
        # By hand: 7 (12 d^2 + 13 d) + the patches, token, positions, last norm and head, d = 384.
        ("vit", 32, {}, 12_470_026),
        # What timm counts for deit_tiny_patch16_224.
        ("deit-tiny", 224, {"classes": 1000}, 5_717_416),
    ],
)
def test_parameter_counts(name, side, options, expected):
    model = models.create(name, **options)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected


def test_groups_are_the_stream_heads_their_dims_and_hidden_units(small):
    net, _, _ = small
    sizes = {}
    for block in ("params/block1", "params/block2"):
        sizes[f"{block}/attention/query:heads"] = 3
        sizes[f"{block}/attention/query:dims"] = 4
        sizes[f"{block}/attention/value:dims"] = 4
        sizes[f"{block}/mlp1"] = 48
    assert net.spec.sizes == {"params/patches": 12, **sizes}
    stream = {a.path for a in net.spec.groups["params/patches"]}
    assert {"params/token", "params/positions", "params/norm/scale"} <= stream
    assert not any(a.path.startswith("params/head/bias") for a in net.spec.groups["params/patches"])


def test_permuting_every_group_keeps_the_function(small):
    net, (tree, _), x = small
    size = float(jnp.abs(net.run(tree, x)).max())
    assert vfjax.check_spec(net, tree, x) < 1e-5 * size


def test_groups_that_share_a_tap_all_have_covariances(small):
    """Heads and the dimensions inside them show in the same values."""
    net, trees, x = small
    found = stats.moments(net, trees, [x], sites="taps", covariance="cross")
    assert found.covariance is not None and set(found.covariance) == set(found.sites)
    site = "params/block1/attention/value/kernel:act"
    for kind, group, n in (("heads", "query", 3), ("dims", "value", 4)):
        name = f"{site}[params/block1/attention/{group}:{kind}]"
        assert found.covariance[name].shape == (2, 2, n, n)


def test_a_block_adds_four_to_the_depth(small):
    net, _, _ = small
    assert net.depth == 1 + 4 * 2 + 1
    depths = {layer.name.removeprefix("params/"): layer.depth for layer in net.layers}
    assert depths["patches/kernel"] == 1
    assert {depths[f"block2/attention/{part}/kernel"] for part in ("query", "key", "value")} == {6}
    assert depths["block2/mlp2/kernel"] == 9
    assert depths["head/kernel"] == 10


def test_preserving_blocks_runs_from_the_merged_model_to_the_ensemble(small):
    net, trees, x = small
    outputs = [net.run(tree, x) for tree in trees]
    cut = {k: merge.preserve_first(net, trees, layers=1 + 4 * k)(x) for k in (0, 1, 2)}
    np.testing.assert_allclose(
        merge.preserve_first(net, trees, layers=net.depth)(x),
        sum(outputs) / 2,
        rtol=1e-4,
        atol=1e-5,
    )
    # The patches are linear: keeping them apart changes nothing but rounding.
    merged = net.run(merge.interpolate(trees), x)
    np.testing.assert_allclose(cut[0], merged, rtol=1e-4, atol=1e-4 * np.abs(merged).max())
    assert np.abs(cut[1] - cut[2]).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [({"heads": 5}, "heads must divide"), ({"patch": 3}, "patch must divide")],
)
def test_errors(options, message):
    model = models.create("vit", **{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
