"""ConvNeXt, and ResNet and VGG for ImageNet: layers, depths, groups, invariance, pruning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import models, prune, renorm, stats

# Two blocks in one stage, so that streams, joins and further stages all occur.
CONVNEXT = {"depths": (1, 2), "dims": (6, 8), "patch": 2, "classes": 5}
NARROW = {
    "convnext-pico": (CONVNEXT, 8),
    "resnet50": ({"width": 1 / 16, "classes": 5}, 32),
    # Two by two pixels reach the dense layers, so that flattening matters.
    "imagenet-vgg16": ({"depth": 11, "width": 1 / 32, "classes": 5}, 64),
    "imagenet-vgg16-bn": ({"depth": 11, "width": 1 / 32, "classes": 5}, 64),
}


def traced(name, **changes):
    """The network, a tree whose leaves are all far from their initial constants, and images."""
    options, side = NARROW[name]
    model = models.create(name, **options | changes)
    x = jnp.float32(np.random.default_rng(0).normal(size=(2, side, side, 3)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        drawn = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "var":
            return jnp.asarray(0.5 + drawn**2)
        # Kernels that keep the size of what passes: fifty layers of others would overflow.
        inputs = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 4
        return jnp.asarray(drawn * np.sqrt(2 / inputs))

    tree = jax.tree_util.tree_map_with_path(draw, shapes)
    return vfjax.trace(models.apply_fn(model), shapes, x), tree, x


@pytest.mark.parametrize("name", NARROW)
def test_permuting_every_group_keeps_the_function(name):
    net, tree, x = traced(name)
    size = float(jnp.abs(net.run(tree, x)).max())
    assert np.isfinite(size) and size > 0
    assert vfjax.check_spec(net, tree, x) < 1e-5 * size


def test_convnext():
    net, _, _ = traced("convnext-pico")
    layers = {layer.name.removeprefix("params/"): layer for layer in net.layers}
    assert [(name, layer.depth, layer.kind) for name, layer in layers.items()] == [
        ("stem/kernel", 1, "conv"),
        ("stage1_block1/depthwise/kernel", 2, "conv"),
        ("stage1_block1/mlp1/kernel", 3, "dense"),
        ("stage1_block1/mlp2/kernel", 4, "dense"),
        ("down2/kernel", 5, "conv"),
        ("stage2_block1/depthwise/kernel", 6, "conv"),
        ("stage2_block1/mlp1/kernel", 7, "dense"),
        ("stage2_block1/mlp2/kernel", 8, "dense"),
        ("stage2_block2/depthwise/kernel", 9, "conv"),
        ("stage2_block2/mlp1/kernel", 10, "dense"),
        ("stage2_block2/mlp2/kernel", 11, "dense"),
        ("head/kernel", 12, "dense"),
    ]
    assert all(layer.main and layer.bias for layer in layers.values())
    blocks = [f"params/stage{s}_block{b}" for s, b in ((1, 1), (2, 1), (2, 2))]
    expected = [f"{block}/mlp{k}/kernel" for block in blocks for k in (1, 2)]
    assert list(prune.prunable(net, kinds=["dense"], first=False, last=False)) == expected
    # A stream for each stage, hidden units for each block; the scale of a block follows its stream.
    hidden = {f"{block}/mlp1": 4 * size for block, size in zip(blocks, (6, 8, 8), strict=True)}
    assert net.spec.sizes == {"params/stem": 6, "params/down2": 8, **hidden}
    stream = {axis.path for axis in net.spec.groups["params/down2"]}
    for block in blocks[1:]:
        members = ("layer_scale", "depthwise/kernel", "norm/scale", "mlp1/kernel", "mlp2/bias")
        assert {f"{block}/{member}" for member in members} <= stream


def test_taps_of_convnext_are_what_the_next_layer_reads():
    net, tree, x = traced("convnext-pico")
    layers = [layer.name for layer in net.layers]
    taps = stats.resolve_sites(net, "taps")
    assert list(taps) == [f"{name}:act" for name in layers[:-1]]
    _, found = net.run(tree, x, capture=[*taps, *(f"{name}:in" for name in layers[1:])])
    for tap, after in zip(taps[:-1], layers[1:], strict=False):
        np.testing.assert_allclose(found[tap], found[f"{after}:in"], rtol=1e-4, atol=1e-5)
    # The last is the map that is averaged, and normalised then.
    mean = np.asarray(found[taps[-1]]).mean((1, 2))
    norm = tree["params"]["head_norm"]
    mean = mean - mean.mean(-1, keepdims=True)
    rows = mean / np.sqrt((mean**2).mean(-1, keepdims=True) + 1e-6)
    rows = rows * np.asarray(norm["scale"])[None] + np.asarray(norm["bias"])[None]
    np.testing.assert_allclose(found["params/head/kernel:in"], rows, rtol=1e-3, atol=1e-4)


def test_a_pruned_convnext_is_repaired():
    net, tree, x = traced("convnext-pico", depths=(1,), dims=(6,))
    layers = prune.prunable(net, kinds=["dense"], first=False, last=False)
    mask = prune.masks(prune.magnitude(net, tree, names=layers), 0.5, scope="row")
    pruned = prune.apply(tree, mask)
    repaired = renorm.repair(net, pruned, [x], references=[tree])
    sites = stats.resolve_sites(net, "paper")
    goal, before, after = (
        stats.moments(net, [each], [x], sites=sites) for each in (tree, pruned, repaired)
    )

    def distance(found):
        return max(float(jnp.abs(found.std[site] / goal.std[site] - 1).max()) for site in sites)

    assert distance(after) < 1e-2 < 0.2 < distance(before)


def test_convnext_starts_near_its_skips():
    model = models.create("convnext-pico", depths=(1,), dims=(8,))
    x = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    params = jax.jit(lambda key: model.lazy_init(key, x))(jax.random.key(0))["params"]
    assert np.all(np.asarray(params["stage1_block1"]["layer_scale"]) == np.float32(1e-6))
    kernel = np.asarray(params["stage1_block1"]["mlp1"]["kernel"])
    assert np.std(kernel) == pytest.approx(0.02, rel=0.15)  # Of 256 draws.


def test_resnet50():
    net, _, _ = traced("resnet50")
    assert net.depth == 50 and len(net.layers) == 54
    assert len(net.norms) == 53
    shortcuts = [layer for layer in net.layers if not layer.main]
    assert [layer.name for layer in shortcuts] == [
        f"params/stage{stage}_block1/shortcut/kernel" for stage in (1, 2, 3, 4)
    ]
    # A stream for each stage, two widths inside each block, and the stem.
    assert len(net.spec.sizes) == 4 + 2 * 16 + 1
    assert net.spec.sizes["params/stage4_block1/conv3"] == 128
    assert len(prune.prunable(net, first=False, shortcuts=False)) == 49


@pytest.mark.parametrize("name", ["imagenet-vgg16", "imagenet-vgg16-bn"])
def test_vgg(name):
    net, _, _ = traced(name)
    assert net.depth == len(net.layers) == 11
    assert len(net.norms) == (8 if name.endswith("bn") else 0)
    names = [f"conv{k}" for k in range(1, 9)] + ["dense1", "dense2"]
    assert set(net.spec.sizes) == {f"params/{name}" for name in names}
    # The channels of the last map go on in the rows of the first dense kernel, pixel by pixel.
    last = {axis.path for axis in net.spec.groups["params/conv8"]}
    assert "params/dense1/kernel" in last
