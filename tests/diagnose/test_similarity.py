"""Linear CKA against its laws and a NumPy oracle; distances between parameter trees."""

from __future__ import annotations

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import along
from vfjax import merge
from vfjax.diagnose import CKA, cka, distance

# Sums of float32 products over examples, in other orders.
ROUNDING = 2e-5


def mlp(v, x):
    x = x @ v["w1"]
    x = jnp.tanh(x + along(v["b1"], x))
    x = jax.nn.relu(x @ v["w2"])
    return x @ v["w3"]


def cnn(v, x):
    x = x.reshape(len(x), 2, 3, 1)
    x = jax.lax.conv_general_dilated(
        x, v["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.relu(x).reshape(len(x), -1) @ v["head"]


P = 6
MLP = {"w1": (P, 5), "b1": (5,), "w2": (5, 7), "w3": (7, 3)}
CNN = {"k": (3, 3, 1, 4), "head": (24, 3)}


def draw(seed, shapes):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def inputs(count, seed=3):
    return np.random.default_rng(seed).normal(size=(count, P)).astype(np.float32)


def features(net, tree, names, x):
    _, found = net.run(tree, x, capture=names)
    return [np.asarray(found[name], np.float64).reshape(len(x), -1) for name in names]


def oracle(xs, ys):
    """Linear CKA by its definition, in float64."""
    xs, ys = ([x - x.mean(0, keepdims=True) for x in of] for of in (xs, ys))

    def inner(x, y):
        return np.square(y.T @ x).sum()

    return np.array([[inner(x, y) / np.sqrt(inner(x, x) * inner(y, y)) for y in ys] for x in xs])


def hsic(x, y):
    """The unbiased estimate, by its definition."""
    n, ones = len(x), np.ones(len(x))
    k, m = (v @ v.T * (1 - np.eye(n)) for v in (x, y))
    found = np.trace(k @ m) + ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (found - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


@pytest.fixture(scope="module")
def nets():
    with jax.numpy_rank_promotion("raise"):
        a, c = draw(0, MLP), draw(1, CNN)
        return vfjax.trace(mlp, a, inputs(4)), a, vfjax.trace(cnn, c, inputs(4)), c


SITES, CONV = ["w1:act", "w2:act", "output"], ["k:act", "head"]


# --------------------------------------------------------------------------------------------- laws


def smaller_form(*arguments, **options):
    """Which of its two forms exact CKA takes: the error for too little memory names both sizes."""
    with pytest.raises(ValueError) as error:
        cka(*arguments, memory=1, **options)
    sizes = re.findall(r"([\d.]+) MiB for (covariances|Gram matrices)", str(error.value))
    return min(sizes, key=lambda size: float(size[0]))[1]


# The first is small enough for Gram matrices, the second for products of features.
@pytest.mark.parametrize("count", [9, 200])
def test_equals_the_definition(nets, count):
    mlp_net, a, cnn_net, c = nets
    x = inputs(count)
    found = cka((mlp_net, a), (cnn_net, c), [x], sites=SITES, second_sites=CONV)
    expected = oracle(features(mlp_net, a, SITES, x), features(cnn_net, c, CONV, x))
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=ROUNDING)
    assert (found.first, found.second, found.examples) == (tuple(SITES), tuple(CONV), count)


@pytest.mark.parametrize("cuts", [[4], [1, 2, 8]])
@pytest.mark.parametrize("form, count", [("Gram matrices", 9), ("covariances", 200)])
def test_batches_may_be_cut_any_way(nets, cuts, form, count):
    mlp_net, a, cnn_net, c = nets
    x = inputs(count)
    arguments = (mlp_net, a), (cnn_net, c)
    options = {"sites": SITES, "second_sites": CONV}
    assert smaller_form(*arguments, [x], **options) == form
    found = cka(*arguments, [(part, None) for part in np.split(x, cuts)], **options)
    expected = oracle(features(mlp_net, a, SITES, x), features(cnn_net, c, CONV, x))
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=ROUNDING)


def test_sites_may_take_several_passes(monkeypatch):
    """Each reads as many sites as have features that fit, besides the widest of them."""
    a, c, x = draw(0, MLP), draw(1, CNN), inputs(9)
    # Five matrices of 9 x 9, and the features of the widest site twice, in float32.
    least = 4 * (5 * 9**2 + 2 * 9 * 24)
    options = {"sites": SITES, "second_sites": CONV}

    def networks():  # For which nothing is compiled yet, so that what runs is traced.
        return (vfjax.trace(mlp, a, inputs(4)), a), (vfjax.trace(cnn, c, inputs(4)), c)

    expected = cka(*networks(), [x], **options).matrix
    read, run = [], vfjax.Network.run

    def watched(net, variables, x, **kwargs):
        if len(x) == 9:
            read.append([*kwargs["capture"]])
        return run(net, variables, x, **kwargs)

    monkeypatch.setattr(vfjax.Network, "run", watched)
    one, two, three = ([site] for site in SITES)
    four, five = ([site] for site in CONV)
    for features, sites in (
        (0, [one, two, three, four, five]),
        (5, [one + two, three, four, five]),
        (8, [one + two + three, four + five]),
    ):
        read.clear()
        found = cka(*networks(), [x], memory=least + 4 * 9 * features, **options).matrix
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
        assert read == sites
    with pytest.raises(ValueError, match="MiB for Gram matrices, more than memory"):
        cka(*networks(), [x], memory=least - 1, **options)


@pytest.mark.parametrize("estimator", ["exact", "minibatch"])
def test_itself(nets, estimator):
    net, a, _, _ = nets
    found = cka((net, a), (net, a), [inputs(30)], sites=SITES, estimator=estimator).matrix
    np.testing.assert_array_equal(np.diagonal(found), 1)
    np.testing.assert_allclose(found, found.T, rtol=0, atol=1e-12)
    # The same numbers in another tree: nothing is known to be equal.
    other = cka((net, a), (net, dict(a)), [inputs(30)], sites=SITES, estimator=estimator).matrix
    np.testing.assert_allclose(other, found, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scale", [1e-15, 1e-10, 1e10, 1e15])
@pytest.mark.parametrize(
    "form, count", [("covariances", 12), ("Gram matrices", 3), ("minibatch", 12)]
)
def test_the_size_of_the_features_makes_no_difference(nets, form, count, scale):
    net, a, _, _ = nets
    estimator = "minibatch" if form == "minibatch" else "exact"
    # A linear head, of which only the size changes.
    scaled = {**a, "w3": a["w3"] * np.float32(scale)}
    data = [inputs(count), inputs(count - 1, seed=4)]
    options = {"sites": ["w1:act", "output"], "estimator": estimator, "progress": False}
    if estimator == "exact":
        assert smaller_form((net, scaled), (net, a), data, **options) == form
    wanted = cka((net, a), (net, dict(a)), data, **options).matrix
    found = cka((net, scaled), (net, a), data, **options).matrix
    np.testing.assert_allclose(found, wanted, rtol=0, atol=ROUNDING)
    if estimator == "exact":
        assert (found <= 1).all() and (wanted <= 1).all()


@pytest.mark.parametrize("estimator", ["exact", "minibatch"])
def test_modules_and_dictionaries(estimator):
    """One function as an Equinox module, an NNX one, and of a dict with integers."""
    rng = np.random.default_rng(0)
    v = {"table": (4, 6), "w1": (P, 6), "w2": (6, 3)}
    v = {name: np.float32(rng.normal(size=shape)) for name, shape in v.items()}
    data = [{"token": np.arange(8, dtype=np.int32) % 4, "x": inputs(8, seed=s)} for s in (0, 1)]

    def plain(v, x):
        return jnp.tanh(v["table"][x["token"]] + x["x"] @ v["w1"]) @ v["w2"]

    def linear(kernel):
        made = eqx.nn.Linear(*kernel.shape, use_bias=False, key=jax.random.key(0))
        return eqx.tree_at(lambda m: m.weight, made, jnp.asarray(kernel.T))

    module = {"table": jnp.asarray(v["table"]), "w1": linear(v["w1"]), "w2": linear(v["w2"])}
    params, static = eqx.partition(module, eqx.is_array)

    def equinox(p, x):
        m = eqx.combine(p, static)
        hidden = jnp.tanh(m["table"][x["token"]] + jax.vmap(m["w1"])(x["x"]))
        return jax.vmap(m["w2"])(hidden)

    class Net(nnx.Module):
        def __init__(self):
            self.table, self.w1, self.w2 = (nnx.Param(jnp.asarray(a)) for a in v.values())

        def __call__(self, x):
            hidden = jnp.tanh(self.table[...][x["token"]] + x["x"] @ self.w1[...])
            return hidden @ self.w2[...]

    graph, state = nnx.split(Net())
    nets = [
        (vfjax.trace(fn, tree, data[0]), tree)
        for fn, tree in (
            (plain, v),
            (equinox, params),
            (lambda s, x: nnx.merge(graph, s)(x), state),
        )
    ]
    options = {"sites": "layers", "estimator": estimator, "progress": False}
    wanted = cka(nets[0], nets[0], data, **options).matrix
    for other in nets[1:]:
        found = cka(nets[0], other, data, **options)
        assert len(found.second) == 2
        np.testing.assert_allclose(found.matrix, wanted, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("estimator", ["exact", "minibatch"])
def test_symmetry(nets, estimator):
    mlp_net, a, cnn_net, c = nets
    options = {"estimator": estimator, "progress": False}
    data = [inputs(20), inputs(12, seed=4)]
    there = cka((mlp_net, a), (cnn_net, c), data, sites=SITES, second_sites=CONV, **options)
    back = cka((cnn_net, c), (mlp_net, a), data, sites=CONV, second_sites=SITES, **options)
    np.testing.assert_allclose(there.matrix, back.matrix.T, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("count", [4, 60])
def test_orthogonal_maps_scales_and_shifts_change_nothing(nets, count):
    net, a, _, _ = nets
    rng = np.random.default_rng(5)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0].astype(np.float32)
    b = a | {"w1": 3 * a["w1"] @ turn, "b1": a["b1"] + 2}
    found = cka((net, a), (net, b), [inputs(count)], sites=["w1"]).matrix
    np.testing.assert_allclose(found, 1, rtol=0, atol=ROUNDING)
    stretched = a | {"w1": a["w1"] * np.array([[5, 1, 1, 1, 1]], np.float32)}
    assert cka((net, a), (net, stretched), [inputs(60)], sites=["w1"]).matrix < 0.9


def test_permuted_units_change_nothing(nets):
    net, a, _, _ = nets
    b = net.spec.permute(a, net.spec.random(jax.random.key(0), a))
    data = [inputs(30)]
    expected = cka((net, a), (net, a), data).matrix
    np.testing.assert_allclose(cka((net, a), (net, b), data).matrix, expected, atol=ROUNDING)


def test_large_offsets_cost_no_digits(nets):
    net, a, cnn_net, c = nets
    shifted = a | {"b1": a["b1"] + np.float32(1000)}
    x = inputs(50)
    for data in ([x], [x[:3], x[3:]]):
        found = cka((net, a), (net, shifted), data, sites=["w1"]).matrix
        # The pre-activation itself is rounded to 1000 times the eps of float32.
        np.testing.assert_allclose(found, 1, rtol=0, atol=1e-3)


def test_what_does_not_vary_has_none(nets):
    net, a, cnn_net, c = nets
    dead = a | {"w1": 0 * a["w1"], "b1": a["b1"] + np.float32(0.1)}
    for data in ([inputs(50)], [inputs(3)]):
        found = cka((net, dead), (cnn_net, c), data, sites=["input", "w1"], second_sites=CONV)
        assert np.isfinite(found.matrix[0]).all()
        assert np.isnan(found.matrix[1]).all()
    assert "from" in repr(found)
    assert "undefined" in repr(CKA(np.full((1, 1), np.nan), ("a",), ("b",), 4, "exact"))


# -------------------------------------------------------------------------------------- minibatches


def test_minibatches_equal_the_definition(nets):
    mlp_net, a, cnn_net, c = nets
    data = [inputs(12), inputs(3, seed=4), inputs(7, seed=5)]  # the second is too small to count
    found = cka(
        (mlp_net, a), (cnn_net, c), data, sites=SITES, second_sites=CONV, estimator="minibatch"
    )
    assert (found.examples, found.estimator) == (19, "minibatch")

    def pooled(one, other):
        return sum(
            len(x) * hsic(one(x), other(x)) for x in (data[0], data[2])
        )  # batches count by their examples

    xs, ys = (
        [lambda x, n=n, net=net, tree=tree: features(net, tree, [n], x)[0] for n in names]
        for net, tree, names in ((mlp_net, a, SITES), (cnn_net, c, CONV))
    )
    expected = [[pooled(p, q) / np.sqrt(pooled(p, p) * pooled(q, q)) for q in ys] for p in xs]
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=ROUNDING)


def test_minibatches_approach_the_exact_value(nets):
    net, a, _, _ = nets
    x = inputs(2000)
    exact = cka((net, a), (net, a), [x], sites=SITES).matrix
    data = np.split(x, 20)
    found = cka((net, a), (net, a), data, sites=SITES, estimator="minibatch").matrix
    # Noise of about one over the root of the number of examples.
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.03)


# ------------------------------------------------------------------------------------ kinds of nets


def test_merged_models(nets):
    net, a, _, _ = nets
    b = draw(7, MLP)
    model = merge.preserve_first(net, [a, b], layers=2)
    x = inputs(40)
    found = cka(model, (net, a), [x], second_sites=SITES)
    # Taps of the first layer have a value per model; that of the second is behind the cut.
    assert found.first == ("w2:act", "w3:act")
    _, values = model.run(x, capture=["w2:act", "w3:act"])
    expected = oracle(
        [np.asarray(v, np.float64) for v in values.values()], features(net, a, SITES, x)
    )
    np.testing.assert_allclose(found.matrix, expected, rtol=0, atol=ROUNDING)
    alone = cka(model, model, [x])
    np.testing.assert_array_equal(np.diagonal(alone.matrix), 1)
    with pytest.raises(ValueError, match="'w1:act' lie inside the stems"):
        cka(model, (net, a), [x], sites=["w1:act"])


def test_examples_need_not_come_first():
    def transposed(v, x):
        return (v["w2"] @ jnp.tanh(v["w1"] @ x.T)).T

    def merged(v, x):
        x = x.reshape(-1, 3) @ v["w1"][:3, :2]  # two positions per example
        return jnp.tanh(x).reshape(-1, 4) @ v["w2"][:4, :2]

    v, x = {"w1": draw(0, MLP)["w1"].T, "w2": draw(0, {"w": (4, 5)})["w"]}, inputs(5)
    net = vfjax.trace(transposed, v, x)  # the first axis is as long as the batch
    pre = np.float64(v["w1"] @ x.T).T
    found = cka((net, v), (net, v), [x], sites=["w1", "output"]).matrix
    expected = oracle([pre, features(net, v, ["output"], x)[0]], [pre, np.tanh(pre) @ v["w2"].T])
    np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
    net = vfjax.trace(merged, v, x)
    found = cka((net, v), (net, v), [x], sites=["w1", "input"]).matrix
    pre = (x.reshape(-1, 3) @ v["w1"][:3, :2]).reshape(5, -1)
    np.testing.assert_allclose(found[0, 1], oracle([pre], [x])[0, 0], rtol=0, atol=ROUNDING)


def test_double_precision(x64):
    a, x = jax.tree.map(np.float64, draw(0, MLP)), np.float64(inputs(20))
    net = vfjax.trace(mlp, a, x)
    found = cka((net, a), (net, a), [x], sites=SITES).matrix
    np.testing.assert_allclose(found, oracle(*(2 * [features(net, a, SITES, x)])), atol=1e-13)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches(nets, kind):
    net, a, _, _ = nets
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    over = NamedSharding(mesh, PartitionSpec("batch"))
    # Gram matrices for the first, covariances for the second.
    for sizes, estimator in (((4, 1), "exact"), ((32, 5), "exact"), ((32, 5), "minibatch")):
        parts = [inputs(size, seed=k) for k, size in enumerate(sizes)]
        # The ragged last batch divides by no mesh and stays on the host.
        sharded = [jax.device_put(parts[0], over), parts[1]]
        options = {"sites": ["w1", "output"], "estimator": estimator}
        expected = cka((net, a), (net, a), parts, **options).matrix
        found = cka((net, a), (net, a), sharded, **options).matrix
        np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)


# ------------------------------------------------------------------------------------------- errors


def test_cka_errors(nets):
    net, a, cnn_net, c = nets
    one, other, data = (net, a), (cnn_net, c), [inputs(8)]
    with pytest.raises(ValueError, match="estimator must be"):
        cka(one, other, data, estimator="debiased")
    with pytest.raises(TypeError, match="first must be a pair"):
        cka(a, other, data)
    with pytest.raises(TypeError, match="second must be a pair"):
        cka(one, net, data)
    with pytest.raises(ValueError, match="second must be one network, got variables of 2"):
        cka(one, (net, [a, a]), data)
    with pytest.raises(ValueError, match="second"):
        cka(one, (net, c), data)
    with pytest.raises(ValueError, match="no site"):
        cka(one, other, data, sites=["w9"])
    with pytest.raises(ValueError, match="at least 2 examples"):
        cka(one, other, [inputs(1)])
    with pytest.raises(ValueError, match="batches of 4 examples"):
        cka(one, other, [inputs(3)], estimator="minibatch")
    with pytest.raises(ValueError, match="gave no batches"):
        cka(one, other, [])
    narrow = vfjax.trace(lambda v, x: x @ v["w"], {"w": jnp.ones((3, 2))}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="must take the same input"):
        cka(one, (narrow, {"w": jnp.ones((3, 2))}), data)
    pair = vfjax.trace(lambda v, x: (x @ v["w1"], x), {"w1": a["w1"]}, data[0])
    with pytest.raises(TypeError, match='site "output" must hold an array'):
        cka((pair, {"w1": a["w1"]}), other, data, sites=["output"])
    pooled = vfjax.trace(lambda v, x: (x @ v["w1"]).sum(0), {"w1": a["w1"]}, data[0])
    with pytest.raises(ValueError, match="no axis of it holds the examples"):
        cka((pooled, {"w1": a["w1"]}), other, data, sites=["output"])


@pytest.mark.parametrize("count", [3, 50])
def test_nan_is_told(nets, count):
    net, a, _, _ = nets
    x = inputs(count)
    x[1, 1] = np.nan
    for estimator in ("exact", "minibatch")[: 1 + (count > 3)]:
        with pytest.raises(ValueError, match="NaN or infinite values at 'w1'"):
            cka((net, a), (net, a), [x], sites=["w1"], estimator=estimator)


# ----------------------------------------------------------------------------------------- distance


def test_distance_by_hand():
    a = {"w": np.float32([[3, 0]]), "b": np.float32([1]), "step": np.int32(3)}
    b = {"w": np.float32([[0, 4]]), "b": np.float32([1]), "step": np.int32(7)}
    found = distance(a, b)
    assert found.total == 5
    assert found.by_leaf == {"b": 0, "w": 5}
    assert found.cosine == pytest.approx(1 / np.sqrt(10 * 17))
    found = distance(a, b, relative=True)
    assert found.by_leaf == {"b": 0, "w": pytest.approx(5 / 3.5)}
    assert found.total == pytest.approx(5 / ((np.sqrt(10) + np.sqrt(17)) / 2))
    assert "step" not in found.by_leaf


def test_distance_laws(nets):
    net, a, _, _ = nets
    b, c = draw(8, MLP), draw(9, MLP)
    assert distance(a, a).total == 0
    assert distance(a, a).cosine == pytest.approx(1)
    assert distance(a, b).total == distance(b, a).total
    assert distance(a, c).total <= distance(a, b).total + distance(b, c).total
    assert distance(a, b).total == pytest.approx(
        np.sqrt(sum(v**2 for v in distance(a, b).by_leaf.values()))
    )
    # Both trees permuted alike are as far apart as before.
    permutations = net.spec.random(jax.random.key(0), a)
    moved = distance(net.spec.permute(a, permutations), net.spec.permute(b, permutations))
    assert moved.total == pytest.approx(distance(a, b).total)
    opposite = jax.tree.map(lambda v: -v, a)
    assert distance(a, opposite, relative=True).total == pytest.approx(2)
    assert distance(a, opposite).cosine == pytest.approx(-1)
    zero = jax.tree.map(np.zeros_like, a)
    assert distance(zero, zero, relative=True).total == 0
    assert np.isnan(distance(zero, a).cosine)
    tenfold = [jax.tree.map(lambda v: 10 * v, tree) for tree in (a, b)]
    assert distance(*tenfold).total == pytest.approx(10 * distance(a, b).total, rel=1e-6)
    relative = distance(a, b, relative=True).total
    assert distance(*tenfold, relative=True).total == pytest.approx(relative, rel=1e-6)


def test_distance_without_stored_statistics():
    def normalised(v, x):
        x = x @ v["w"]
        return (x - along(v["mean"], x)) * along(jax.lax.rsqrt(v["var"] + 1e-5), x)

    a = {"w": np.ones((P, 2), np.float32), "mean": np.zeros(2, np.float32)}
    a["var"] = np.ones(2, np.float32)
    b = a | {"mean": np.full(2, 9, np.float32)}
    net = vfjax.trace(normalised, a, inputs(4))
    assert distance(a, b).total == pytest.approx(9 * np.sqrt(2))
    found = distance(a, b, net=net)
    assert found.total == 0
    assert list(found.by_leaf) == ["w"]


def test_distance_in_half_precision_and_complex():
    a = {"w": jnp.ones(3, jnp.bfloat16), "c": jnp.array([3 + 4j])}
    b = {"w": jnp.full(3, 3, jnp.bfloat16), "c": jnp.array([0j])}
    found = distance(a, b)
    assert found.by_leaf == {"c": pytest.approx(5), "w": pytest.approx(2 * np.sqrt(3))}


def test_distance_errors(nets):
    net, a, cnn_net, c = nets
    with pytest.raises(ValueError, match="differs in structure"):
        distance(a, c)
    with pytest.raises(ValueError, match="traced network"):
        distance(a, a, net=cnn_net)
    with pytest.raises(TypeError, match="net must be a Network"):
        distance(a, a, net=mlp)
    with pytest.raises(ValueError, match="NaN"):
        distance(a, a | {"b1": np.full(5, np.nan, np.float32)})
