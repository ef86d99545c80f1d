"""Tests of the decomposition of linear networks, and of the magnitude argument."""

from __future__ import annotations

import itertools

import equinox as eqx
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vfjax
from helpers import initial
from vfjax import diagnose, merge, models
from vfjax._trees import flatten_named

# Sums of a few dozen products in float32, relative to the largest part of the sum.
RTOL = 1e-5


def _normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def _close(found, wanted, scale=None, rtol=RTOL):
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    scale = np.abs(wanted).max(initial=0) if scale is None else scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=rtol * scale)


@st.composite
def chains(draw):
    """Weights, biases (some missing), inputs and residual layers of a linear network."""
    depth = draw(st.integers(1, 4))
    widths = [draw(st.sampled_from([2, 3]))]
    residual = []
    for number in range(1, depth + 1):
        if draw(st.booleans()):
            residual.append(number)
            widths.append(widths[-1])
        else:
            widths.append(draw(st.sampled_from([2, 3])))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weights = [_normal(rng, *pair) for pair in itertools.pairwise(widths)]
    biases = [_normal(rng, n) if draw(st.booleans()) else None for n in widths[1:]]
    return weights, biases, _normal(rng, 4, widths[0]), residual


def _apply(residual):
    def apply_fn(v, x):
        for number, kernel in enumerate(v["weights"], start=1):
            y = x @ kernel
            if str(number) in v["biases"]:
                y = y + v["biases"][str(number)][None]
            x = x + y if number in residual else y
        return x

    return apply_fn


def _traced(weights, biases, x, residual):
    named = {str(k): b for k, b in enumerate(biases, start=1) if b is not None}
    variables = {"weights": weights, "biases": named}
    return vfjax.trace(_apply(residual), variables, x), variables


def _layers(weights, biases, x, residual):
    """Values of every layer in float64."""
    values, x = [], np.float64(x)
    for number, (kernel, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        y = x @ np.float64(kernel) + (0 if bias is None else bias)
        values.append(x := x + y if number in residual else y)
    return values


def _symmetric(matrices, k):
    """`e_k`: the sum over all choices of k matrices of their product, later ones on the left."""
    n = len(matrices[0])
    total = np.zeros((n, n))
    for chosen in itertools.combinations(matrices, k):
        product = np.eye(n)
        for matrix in chosen:
            product = matrix @ product
        total += product
    return total


SETTINGS = hypothesis.settings(max_examples=12, deadline=None, derandomize=True)


@SETTINGS
@hypothesis.given(chains())
def test_a_traced_network_and_its_matrices_agree_with_the_layers(chain):
    weights, biases, x, residual = chain
    net, variables = _traced(*chain)
    traced = diagnose.decompose(net, variables, x)
    explicit = diagnose.decompose_matrices(weights, biases, x, residual=residual)
    values, offsets = (_layers(weights, biases, a, residual) for a in (x, np.zeros_like(x[:1])))
    sites = [layer.tap for layer in net.layers]
    assert list(traced.value) == sites
    for number, (f, h) in enumerate(zip(values, offsets, strict=True), start=1):
        for found, site in ((traced, sites[number - 1]), (explicit, str(number))):
            scale = np.abs(f).max() + np.abs(h).max() + np.abs(f - h).max()
            _close(found.value[site], f, scale)
            _close(found.offset[site], h, scale)
            _close(found.feature[site], f - h, scale)
            parts = found.contributions[site].values()
            _close(found.offset[site], sum(map(np.float64, parts), start=np.zeros_like(h)), scale)
            assert not np.asarray(found.rest[site]).any()
        # Of every bias up to this layer, and of no other.
        known = [j for j in range(1, number + 1) if biases[j - 1] is not None]
        assert list(explicit.contributions[str(number)]) == [str(j) for j in known]
        one, other = traced.contributions[sites[number - 1]], explicit.contributions[str(number)]
        assert set(one) == {f"biases/{j}" for j in known}
        for j in known:
            _close(one[f"biases/{j}"], other[str(j)], scale)


def test_the_elementary_symmetric_products_of_the_residual_network():
    """The proposition as printed, with products in decreasing order of index."""
    rng = np.random.default_rng(0)
    depth, n = 4, 3
    weights, biases, x = [_normal(rng, n, n) for _ in range(depth)], _normal(rng, depth, n), None
    x = _normal(rng, 5, n)
    found = diagnose.decompose_matrices(weights, biases, x, residual=range(1, depth + 1))
    # Of column vectors.
    columns = [np.float64(w).T for w in weights]
    for level in range(1, depth + 1):
        sums = sum(_symmetric(columns[:level], j) for j in range(level + 1))
        _close(found.feature[str(level)], (sums @ np.float64(x).T).T)
        for j in range(1, level + 1):
            rest = columns[j:level]
            after = sum(_symmetric(rest, k) for k in range(level - j + 1)) if rest else np.eye(n)
            part = found.contributions[str(level)][str(j)]
            _close(part[0], after @ np.float64(biases[j - 1]))


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.5, 0.25)])
def test_parts_scale_as_the_magnitude_argument_says(scale):
    """W <- lambda W, b <- mu b: g by lambda^l, the part of bias j by lambda^(l-j) mu."""
    rng = np.random.default_rng(0)
    weights, biases = [_normal(rng, 3, 3) for _ in range(3)], list(_normal(rng, 3, 3))
    x = _normal(rng, 4, 3)
    shrink, fade = map(np.float32, scale)
    before = diagnose.decompose_matrices(weights, biases, x)
    after = diagnose.decompose_matrices(
        [shrink * w for w in weights], [fade * b for b in biases], x
    )
    for level in (1, 2, 3):
        site = str(level)
        _close(after.feature[site], shrink**level * np.asarray(before.feature[site]))
        for j, part in before.contributions[site].items():
            factor = shrink ** (level - int(j)) * fade
            _close(after.contributions[site][j], factor * np.asarray(part))


@pytest.mark.parametrize("residual", [False, True])
def test_the_linear_networks_of_the_experiments(residual):
    model = models.LinearNetwork(width=4, depth=4, residual=residual, classes=3, std=0.5)
    x = _normal(np.random.default_rng(0), 5, 2, 3)
    # Biases start at 0.
    variables = jax.tree.map(lambda a: a + np.float32(0.3), initial(model, x))
    fn = models.apply_fn(model)
    net = vfjax.trace(fn, variables, x)
    found = diagnose.decompose(net, variables, x)
    dense = [variables["params"][f"dense{k}"] for k in range(1, 5)]
    explicit = diagnose.decompose_matrices(
        [d["kernel"] for d in dense],
        [d["bias"] for d in dense],
        x.reshape(5, -1),
        residual=(2, 3) if residual else (),
    )
    for layer, number in zip(net.layers, "1234", strict=True):
        scale = np.abs(explicit.value[number]).max()
        for what in ("value", "feature", "offset"):
            _close(getattr(found, what)[layer.tap], getattr(explicit, what)[number], scale)
        parts = zip(
            found.contributions[layer.tap].values(),
            explicit.contributions[number].values(),
            strict=True,
        )
        for one, other in parts:
            _close(one, other, scale)
    # The features are those that `features` measures.
    norms = diagnose.features(net, variables, [x])
    last = net.layers[-1].tap
    _close(norms.feature[last][0], np.linalg.norm(found.feature[last], axis=1).mean())
    _close(norms.offset[last][0], np.linalg.norm(found.offset[last]))


class Linear(nn.Module):
    """Convolutions without activation, BatchNorm, an average pool, a projected skip."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="a")(x)
        y = nn.BatchNorm(use_running_average=True, name="n")(y)
        y = nn.Conv(2, (3, 3), name="b")(nn.avg_pool(y, (2, 2), (2, 2)))
        y = y + nn.Conv(2, (1, 1), (2, 2), use_bias=False, name="skip")(x)
        return nn.Dense(3, name="head")(y.reshape(len(y), -1)) + 0.5


def test_convolutions_norms_pools_and_constants():
    rng = np.random.default_rng(0)
    model, x = Linear(), _normal(rng, 4, 4, 4, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: np.abs(_normal(rng, *a.shape)), shapes)
    net = vfjax.trace(model.apply, variables, x)
    found = diagnose.decompose(net, variables, x)
    assert set(found.contributions["params/head/kernel:act"]) == {
        *("params/a/bias", "params/b/bias", "params/head/bias"),
        *("params/n/bias", "batch_stats/n/mean"),
    }
    assert set(found.contributions["params/a/kernel:act"]) == {
        *("params/a/bias", "params/n/bias", "batch_stats/n/mean")
    }
    _close(found.rest["params/head/kernel:act"], np.full((1, 3), 0.5))
    for site, value in found.value.items():
        scale = np.abs(value).max()
        parts = [np.float64(p) for p in found.contributions[site].values()]
        _close(found.offset[site], sum(parts, start=np.float64(found.rest[site])), scale)
        total = np.float64(found.feature[site]) + np.float64(found.offset[site])
        _close(value, total, scale)
    # Without any of these biases the network has the feature alone, and the constant.
    bare = jax.tree_util.tree_map_with_path(
        lambda path, a: 0 * a if path[-1].key in ("bias", "mean") else a, variables
    )
    out = model.apply(bare, x) - 0.5
    _close(found.feature["params/head/kernel:act"], out)


def test_a_feature_that_is_far_below_its_offset_keeps_its_digits():
    """The difference f(x) - f(0) would have none left."""
    rng = np.random.default_rng(0)
    weights = [1e-5 * _normal(rng, 3, 3), _normal(rng, 3, 3)]
    biases, x = [1e3 * _normal(rng, 3), None], _normal(rng, 4, 3)
    net, variables = _traced(weights, biases, x, ())
    found = diagnose.decompose(net, variables, x, sites=["output"])
    wanted = np.float64(x) @ np.float64(weights[0]) @ np.float64(weights[1])
    _close(found.feature["output"], wanted)


def test_stacked_layers_have_a_bias_each():
    def apply_fn(v, x):
        x, _ = jax.lax.scan(lambda x, p: (x + x @ p["w"] + p["b"][None], None), x, v)
        return x

    rng = np.random.default_rng(0)
    v = {"w": _normal(rng, 3, 2, 2), "b": _normal(rng, 3, 2)}
    x = _normal(rng, 4, 2)
    net = vfjax.trace(apply_fn, v, x)
    found = diagnose.decompose(net, v, x, sites=["output"])
    explicit = diagnose.decompose_matrices(v["w"], v["b"], x, residual=(1, 2, 3))
    scale = np.abs(explicit.value["3"]).max()
    _close(found.feature["output"], explicit.feature["3"], scale)
    for k in range(3):
        part = found.contributions["output"][f"b[{k}]"]
        _close(part, explicit.contributions["3"][str(k + 1)], scale)


def test_a_leaf_that_also_multiplies_has_no_part_of_its_own():
    def apply_fn(v, x):
        return (x @ v["w"] + v["b"][None]) * v["b"][None] + v["c"][None]

    v = {"w": jnp.eye(2), "b": jnp.full(2, 3.0), "c": jnp.ones(2)}
    net = vfjax.trace(apply_fn, v, jnp.ones((1, 2)))
    found = diagnose.decompose(net, v, jnp.ones((1, 2)))
    assert list(found.contributions["w:act"]) == ["c"]
    _close(found.rest["w:act"], np.full((1, 2), 9.0))
    _close(found.feature["w:act"], np.full((1, 2), 3.0))


def test_a_decomposition_is_a_pytree_and_takes_labels():
    net, v = _traced([np.eye(2, dtype=np.float32)], [None], np.ones((1, 2), np.float32), ())
    found = diagnose.decompose(net, v, (np.ones((3, 2), np.float32), np.zeros(3, int)))
    assert jax.jit(lambda d: d.feature)(found)["weights/0:act"].shape == (3, 2)


@pytest.mark.parametrize(
    ("bend", "primitive"),
    [
        (jax.nn.relu, "max"),
        (jnp.tanh, "tanh"),
        (jax.lax.round, "round"),
        (lambda y: y * y, "mul"),
        (jax.lax.asinh, "asinh"),
        (lambda y: jax.lax.igamma(jnp.ones_like(y), y), "igamma"),
        (lambda y: y / (1 + y), "div"),
        (lambda y: jnp.where(y > 0, y, 0.0), "gt"),
        (lambda y: y.astype(jnp.int32).astype(jnp.float32), "convert_element_type"),
    ],
)
def test_what_is_not_affine_is_told(bend, primitive):
    v, x = {"a": jnp.eye(2), "b": jnp.eye(2)}, jnp.ones((3, 2))
    net = vfjax.trace(lambda v, x: bend(x @ v["a"]) @ v["b"], v, x)
    with pytest.raises(ValueError, match=rf"not affine in its input.*`{primitive}` at \S+\.py:\d+"):
        diagnose.decompose(net, v, x)


@jax.custom_jvp
def _tripled(y):
    return 3 * y


_tripled.defjvp(lambda primals, tangents: (_tripled(*primals), 3 * tangents[0]))


@pytest.mark.parametrize(
    "straight",
    [
        lambda y: jnp.where(jnp.arange(2)[None] > 0, y, 0.0),
        lambda y: jnp.concatenate([y, 2 - y], 1)[:, 1:3],
        lambda y: jnp.pad(y, ((0, 0), (1, 0)))[:, :2] / 3,
        lambda y: jnp.take(y, jnp.array([1, 0]), axis=1),
        lambda y: jnp.cumsum(y, 1),
        lambda y: jnp.fft.irfft(jnp.fft.rfft(y)),
        lambda y: jnp.stack([y, 2 * y]).sum(0),
        lambda y: jnp.tile(jax.device_put(y), (1, 3))[:, 2:4],
        lambda y: jax.lax.complex(y, -y).conj().imag,
        lambda y: jax.checkpoint(lambda y: -2 * y)(y),
        lambda y: jnp.asarray(y).at[:, 0].add(1.0),
        _tripled,
    ],
)
def test_what_is_affine_passes(straight):
    rng = np.random.default_rng(0)
    v, x = {"a": _normal(rng, 2, 2), "b": _normal(rng, 2, 2)}, _normal(rng, 3, 2)

    def apply_fn(v, x):
        return straight(x @ v["a"]) @ v["b"]

    net = vfjax.trace(apply_fn, v, x)
    found = diagnose.decompose(net, v, x, sites=["output"])
    wanted = apply_fn(v, x) - apply_fn(v, np.zeros_like(x))
    _close(found.feature["output"], wanted)


def test_what_may_be_affine_is_told_apart_from_what_is_not():
    v, x = {"a": np.eye(4, dtype=np.float32)}, np.ones((2, 4), np.float32)

    def doubled(y):
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, 2 * s[1]), (0, y))[1]

    net = vfjax.trace(lambda v, x: doubled(x @ v["a"]), v, x)
    wanted = "cannot tell whether net is affine in its input: `while`"
    with pytest.raises(ValueError, match=wanted) as error:
        diagnose.decompose(net, v, x)
    assert "at unknown" not in str(error.value)


def test_full_precision():
    v = {"a": np.eye(2, dtype=np.float32), "bias": np.ones(2, np.float32)}
    x = np.ones((2, 2), np.float32)
    net = vfjax.trace(lambda v, x: (x @ v["a"] + v["bias"][None]) @ v["a"], v, x)
    text = str(jax.make_jaxpr(lambda v, x: diagnose.decompose(net, v, x, sites=["output"]))(v, x))
    products = text.count("dot_general[")
    assert (
        products >= 8
        and text.count("precision=(Precision.HIGHEST") + text.count("precision=Precision.HIGHEST")
        == products
    )


def test_a_merged_model_is_a_network_of_its_own():
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "p": (4,), "b": (4, 2), "q": (2,)}
    trees = [{k: _normal(rng, *s) for k, s in shapes.items()} for _ in range(2)]
    x = _normal(rng, 5, 3)

    def apply_fn(v, x):
        return (x @ v["a"] + v["p"][None]) @ v["b"] + v["q"][None]

    net = vfjax.trace(apply_fn, trees[0], x)
    merged = merge.preserve_first(net, trees, layers=1)
    with pytest.raises(
        TypeError, match=r"decompose\(vfjax.trace\(lambda m, x: m\(x\), merged, x\)"
    ):
        diagnose.decompose(net, merged, x)
    whole = vfjax.trace(lambda m, x: m(x), merged, x)
    found = diagnose.decompose(whole, merged, x, sites=["output"])
    _close(found.value["output"], merged(x))
    parts = found.contributions["output"]
    assert len(parts) == 3  # a bias in each stem, one in the trunk
    _close(sum(parts.values()), found.offset["output"])


def test_errors():
    net, v = _traced([np.eye(2, dtype=np.float32)], [None], np.ones((1, 2), np.float32), ())
    x = np.ones((1, 2), np.float32)
    with pytest.raises(TypeError, match="net must be a Network"):
        diagnose.decompose(None, v, x)
    with pytest.raises(ValueError, match="variables differs"):
        diagnose.decompose(net, {"weights": v["weights"] * 2, "biases": {}}, x)
    with pytest.raises(ValueError, match="no site 'out'"):
        diagnose.decompose(net, v, x, sites=["out"])
    with pytest.raises(ValueError, match="`x`, batch 0 has shape"):
        diagnose.decompose(net, v, x[:, :1])
    wide, square = np.ones((2, 3)), np.ones((2, 2))
    with pytest.raises(ValueError, match="equally many, .* got 1 and 0"):
        diagnose.decompose_matrices([square], [], x)
    with pytest.raises(ValueError, match=r"weights\[1\] must be \[3, out\]"):
        diagnose.decompose_matrices([wide, square], [None, None], x)
    with pytest.raises(ValueError, match=r"biases\[0\] must have shape \[3\]"):
        diagnose.decompose_matrices([wide], [np.ones(2)], x)
    with pytest.raises(ValueError, match="layer 1 is residual"):
        diagnose.decompose_matrices([wide], [None], x, residual=[1])
    with pytest.raises(ValueError, match=r"layers from 1 to 1, got \[0, 2\]"):
        diagnose.decompose_matrices([square], [None], x, residual=[0, 2])
    with pytest.raises(ValueError, match=r"x must be \[n, in\]"):
        diagnose.decompose_matrices([square], [None], x[0])


# ------------------------------------------------------------------------- magnitude argument


def _two(v, x):
    x = jax.nn.relu(x @ v["a"] + v["bias"][None])
    return x @ (v["b"] * v["mask"])


def _edges(rng, count=2):
    mask = np.float32([[1, 0], [1, 1], [0, 1]])
    shapes = {"a": (4, 3), "b": (3, 2), "bias": (3,)}
    edges = [{k: _normal(rng, *s) for k, s in shapes.items()} for _ in range(count)]
    return [{**edge, "mask": mask} for edge in edges]


def test_the_rescale_product_is_its_formula():
    edges = _edges(np.random.default_rng(0))
    net = vfjax.trace(_two, edges[0], np.ones((2, 4), np.float32))
    merged = merge.interpolate(edges)

    def size(tree, name):
        kernel = np.float64(tree[name])
        return np.abs(kernel * tree["mask"] if name == "b" else kernel).mean()

    for weights in (None, (0.25, 0.75)):
        share = weights or (0.5, 0.5)
        wanted, product = {}, 1.0
        for name in ("a", "b"):
            goal = sum(w * size(edge, name) for w, edge in zip(share, edges, strict=True))
            product *= goal / size(merged, name)
            wanted[name] = product
        found = diagnose.rescale_product(net, merged, edges, weights=weights)
        assert found == pytest.approx(wanted, rel=1e-6)
    # Averaging shrinks, so that every factor is at least 1.
    found = diagnose.rescale_product(net, merged, edges)
    assert 1 <= found["a"] <= found["b"]


def test_the_rescale_product_of_a_network_with_itself_is_one():
    edges = _edges(np.random.default_rng(1))
    net = vfjax.trace(_two, edges[0], np.ones((2, 4), np.float32))
    assert diagnose.rescale_product(net, edges[0], [edges[0]]) == {"a": 1.0, "b": 1.0}
    model = merge.preserve_first(net, edges, layers=2)
    # All layers are kept apart.
    assert diagnose.rescale_product(net, model, edges) == pytest.approx({"a": 1.0, "b": 1.0})
    one = merge.preserve_first(net, edges, layers=1)
    whole = diagnose.rescale_product(net, merge.interpolate(edges), edges)
    found = diagnose.rescale_product(net, one, edges)
    assert found == pytest.approx({"a": 1.0, "b": whole["b"] / whole["a"]})


def test_the_rescale_product_takes_the_weights_of_the_merged_model():
    edges = _edges(np.random.default_rng(3))
    net = vfjax.trace(_two, edges[0], np.ones((2, 4), np.float32))
    model = merge.preserve_first(net, edges, layers=2, weights=(0.2, 0.8))
    assert diagnose.rescale_product(net, model, edges) == pytest.approx({"a": 1.0, "b": 1.0})
    equal = diagnose.rescale_product(net, model, edges, weights=(0.5, 0.5))
    assert abs(equal["a"] - 1) > 1e-3


def test_the_rescale_product_of_modules_and_dictionaries():
    rng = np.random.default_rng(4)
    x = {"token": np.arange(5, dtype=np.int32), "more": _normal(rng, 5, 3)}

    def looked_up(v, x):
        return jax.nn.relu(v["table"][x["token"]] + x["more"] @ v["w"]) @ v["head"]

    shapes = {"table": (7, 4), "w": (3, 4), "head": (4, 2)}
    plain = [{k: _normal(rng, *s) for k, s in shapes.items()} for _ in range(2)]
    parts = [
        eqx.partition(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(k)), eqx.is_array) for k in (0, 1)
    ]

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.head = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.first(x)))

    graphs, states = zip(*(nnx.split(Net(nnx.Rngs(k))) for k in (0, 1)), strict=True)
    for fn, edges, data in (
        (looked_up, plain, x),
        (
            lambda p, x: jax.vmap(eqx.combine(p, parts[0][1]))(x),
            [params for params, _ in parts],
            x["more"],
        ),
        (lambda s, x: nnx.merge(graphs[0], s)(x), states, x["more"]),
    ):
        net = vfjax.trace(fn, edges[0], data)
        merged = merge.interpolate(edges)
        sizes = [
            {k: np.abs(np.asarray(v)).mean() for k, v in flatten_named(tree)[0].items()}
            for tree in (*edges, merged)
        ]
        wanted, product = {}, 1.0
        for layer in net.layers:
            a, b, mine = (size[layer.kernel] for size in sizes)
            product *= (a + b) / 2 / mine
            wanted[layer.name] = product
        assert len(wanted) == 2
        assert diagnose.rescale_product(net, merged, edges) == pytest.approx(wanted, rel=1e-5)


def test_errors_of_the_rescale_product():
    edges = _edges(np.random.default_rng(2))
    net = vfjax.trace(_two, edges[0], np.ones((2, 4), np.float32))
    opposite = jax.tree.map(np.negative, edges[0])
    nothing = merge.interpolate([edges[0], opposite | {"mask": edges[0]["mask"]}])
    with pytest.raises(ValueError, match="merged kernel of 'a' is all 0"):
        diagnose.rescale_product(net, nothing, edges)
    with pytest.raises(ValueError, match="references is empty"):
        diagnose.rescale_product(net, edges[0], [])
    with pytest.raises(ValueError, match="1 entries for 2 references"):
        diagnose.rescale_product(net, edges[0], edges, weights=[1.0])
