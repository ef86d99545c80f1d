"""The models: the paper's counts and forms, initial statistics, names."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vfjax import models

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
DIGIT = jax.ShapeDtypeStruct((2, 8, 8, 1), jnp.float32)


def shapes(model, x=IMAGE):
    """The variables' shapes, without computing anything."""
    return jax.eval_shape(model.init, jax.random.key(0), x)


def initialised(model, x):
    """The initial variables, compiled without the forward pass."""
    x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.jit(lambda key: model.lazy_init(key, x))(jax.random.key(0))


def normalised(norm, train=False, scale=1.0):
    """The variables of a small network, and what goes into its first norm and comes out.

    The input is near 3, and varies by `scale`.
    """
    model = models.VGG(depth=7, width=0.125, norm=norm)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = initialised(model, x)
    first = variables["params"]["conv1"]
    first |= {"kernel": scale * first["kernel"], "bias": 0 * first["bias"] + 3}
    _, found = model.apply(
        variables,
        x,
        train=train,
        capture_intermediates=True,
        mutable=["batch_stats", "intermediates"],
    )
    values = [found["intermediates"][name]["__call__"][0] for name in ("conv1", "norm1")]
    return variables, found, *(np.asarray(value, np.float64) for value in values)


def count(model, x=IMAGE):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model, x)["params"]))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # "Vanishing Feature", section 4.1 and the tables of costs.
        ("vgg16", 14_719_818),
        ("vgg16-bn", 14_728_266),
        ("vgg16-ln", 14_728_266),
        ("resnet20", 272_474),
        ("resnet20-ln", 272_474),
        # Without norms 784 scales and shifts go, and half as many biases come (688 and 48 * 2).
        ("resnet20-plain", 272_474 - 784),
    ],
)
def test_parameter_counts(name, expected):
    assert count(models.create(name)) == expected


def test_width_and_classes():
    assert count(models.create("vgg16", width=0.25)) == 922_074
    variables = shapes(models.create("resnet20", width=0.5, classes=100))["params"]
    assert variables["head"]["kernel"].shape == (32, 100)
    assert variables["stem"]["kernel"].shape == (3, 3, 3, 8)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # What torchvision counts for the models of these names.
        ("convnext-tiny", {}, 28_589_128),
        ("convnext-base", {}, 88_591_464),
        ("resnet50", {}, 25_557_032),
        ("resnet50", {"depth": 101}, 44_549_160),
        ("imagenet-vgg16", {}, 138_357_544),
        ("imagenet-vgg16-bn", {}, 138_365_992),
        ("imagenet-vgg16", {"depth": 11}, 132_863_336),
    ],
)
def test_parameter_counts_of_imagenet(name, options, expected):
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    assert count(models.create(name, classes=1000, **options), image) == expected


@pytest.mark.parametrize(("depth", "convs"), [(11, 8), (13, 10), (16, 13), (19, 16)])
def test_vgg_depths(depth, convs):
    names = set(shapes(models.VGG(depth=depth))["params"])
    assert names == {f"conv{index}" for index in range(1, convs + 1)} | {"head"}


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_resnet_depths_count_the_main_path(depth):
    paths = jax.tree_util.tree_leaves_with_path(shapes(models.ResNet(depth=depth))["params"])
    kernels = [jax.tree_util.keystr(path) for path, _ in paths]
    kernels = [path for path in kernels if "kernel" in path]
    assert len([path for path in kernels if "shortcut" not in path]) == depth
    assert len([path for path in kernels if "shortcut" in path]) == 2


def test_vgg_pools_after_the_second_fourth_seventh_and_tenth_convolution():
    jaxpr = jax.make_jaxpr(models.apply_fn(models.create("vgg16")))(
        shapes(models.create("vgg16")), IMAGE
    )
    order = [eqn.primitive.name for eqn in jaxpr.jaxpr.eqns]
    order = [name for name in order if name in ("conv_general_dilated", "reduce_window_max")]
    pools = [k for k, name in enumerate(order) if name == "reduce_window_max"]
    assert [k - n for n, k in enumerate(pools)] == [2, 4, 7, 10]


@pytest.mark.parametrize("name", models.NAMES)
def test_every_name_gives_logits(name):
    model = models.create(name)
    x = DIGIT if name.startswith("digits") else IMAGE
    variables = shapes(model, x)
    assert jax.eval_shape(models.apply_fn(model), variables, x).shape == (2, 10)
    assert ("batch_stats" in variables) == (getattr(model, "norm", None) == "batch")


def test_biases_of_convolutions():
    assert "bias" not in shapes(models.create("resnet20"))["params"]["stem"]
    assert "bias" in shapes(models.create("resnet20-plain"))["params"]["stem"]
    assert "bias" not in shapes(models.create("vgg11", use_bias=False))["params"]["conv1"]


def layers(initialiser):
    """Initial variables of a convolution, from 32 to 64 channels, and of a head for 256 inputs."""
    model = models.VGG(depth=11, width=0.5, classes=200, initialiser=initialiser)
    params = initialised(model, jnp.zeros((1, 32, 32, 3)))["params"]
    return {"conv": params["conv2"], "head": params["head"]}


def test_kaiming_normal():
    params = layers("kaiming_normal")
    # Some 15,000 draws: the deviation is known to 1 %.  Fan-out is 3 * 3 * 64.
    assert np.std(params["conv"]["kernel"]) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    assert np.std(params["head"]["kernel"]) == pytest.approx(0.01, rel=0.03)
    assert not params["conv"]["bias"].any() and not params["head"]["bias"].any()


def test_he_normal():
    params = layers("he_normal")
    assert np.std(params["conv"]["kernel"]) == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.03)
    assert np.std(params["head"]["kernel"]) == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert not params["conv"]["bias"].any() and not params["head"]["bias"].any()


def test_uniform():
    params = layers("uniform")
    for name, fan_in in (("conv", 9 * 32), ("head", 256)):
        for leaf in params[name].values():
            # The largest of 64 uniform draws and more, and their deviation.
            assert np.abs(leaf).max() == pytest.approx(1 / math.sqrt(fan_in), rel=0.1)
            assert np.abs(leaf).max() <= 1 / math.sqrt(fan_in)
            assert np.std(leaf) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.2)


def test_residual_linear_network_is_its_closed_form():
    model = models.LinearNetwork(width=4, depth=4, residual=True, classes=3, std=0.5)
    x = jax.random.normal(jax.random.key(1), (5, 6))
    params = initialised(model, x)["params"]
    k = {index: np.asarray(params[f"dense{index}"]["kernel"]) for index in range(1, 5)}
    expected = np.asarray(x) @ k[1] @ (np.eye(4) + k[2]) @ (np.eye(4) + k[3]) @ k[4]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-6)


def test_layer_norm_is_over_the_channels_of_a_pixel():
    variables, _, x, y = normalised("layer", scale=1e-2)
    assert variables["params"]["norm1"]["scale"].shape == (8,)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    # Inputs near 3 have an error of 1e-7, a hundredth of which is the signal.
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_batch_norm_keeps_nine_tenths_and_is_fixed_in_evaluation():
    _, changed, x, _ = normalised("batch", train=True)
    found = changed["batch_stats"]["norm1"]
    np.testing.assert_allclose(found["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)
    _, _, x, y = normalised("batch")
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-5)


def test_apply_functions_of_equal_models_are_equal():
    one, two = (models.apply_fn(models.create("vgg16", width=0.25)) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    assert one != models.apply_fn(models.create("vgg16"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.create("vgg17"), "name must be one of.*vgg16.*got 'vgg17'"),
        (lambda: models.create("mlp", width=2), "mlp has no option 'width'; it has.*features"),
        (lambda: shapes(models.VGG(depth=12)), "depth must be one of.*got 12"),
        (lambda: shapes(models.ResNet(depth=21)), "depth must be 6 n"),
        (lambda: shapes(models.VGG(norm="group")), "norm must be.*got 'group'"),
        (lambda: shapes(models.VGG(initialiser="he")), "init must be.*got 'he'"),
        (lambda: shapes(models.VGG(width=0)), "width must be a positive"),
        (lambda: shapes(models.ImageNetVGG(depth=12)), "depth must be one of.*got 12"),
        (lambda: shapes(models.BottleneckResNet(depth=20)), "depth must be one of.*got 20"),
        (lambda: shapes(models.ConvNeXt(depths=(3, 3))), "depths and dims must have one entry"),
        (lambda: shapes(models.ConvNeXt(patch=8)), "images of 64 pixels a side at least"),
        (lambda: shapes(models.LinearNetwork(depth=0)), "depth must be at least 1"),
    ],
)
def test_bad_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()
