"""A mask makes a pass over padded data the pass over what is valid, for all that passes over data.

A network that ignores padding computes the same for three positions as for five of which two are
masked. Whatever is measured on the longer input with a mask must therefore be what is measured on
the shorter one without.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import Compilations, conv, norm, of_shapes
from vfjax import align, diagnose, merge, prune, renorm, stats

LONG, SHORT, WIDTH = 5, 3, 4


def sequence(v, x):
    """A convolution with a norm, attention of two heads, a skip, a pool and a head."""
    m = x["mask"]
    h = jax.lax.conv_general_dilated(
        x["u"] * m[..., None], v["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    h = jax.nn.relu(norm(v["norm"], h))
    q, k, u = (jnp.einsum("btd,dhe->bthe", h, v[name]) for name in "qku")
    scores = jnp.einsum("bqhe,bkhe->bhqk", q, k)
    scores = jnp.where(jnp.broadcast_to(m[:, None, None] > 0, scores.shape), scores, -1e9)
    h = h + jnp.einsum("bhqk,bkhe,hed->bqd", jax.nn.softmax(scores), u, v["o"])
    h = jax.nn.relu(h @ v["w"]) * m[..., None]
    pool = h.sum(1) / m.sum(1, keepdims=True)
    return jax.nn.relu(pool @ v["d"] + jnp.broadcast_to(v["bias"], (len(pool), 6))) @ v["e"]


SHAPES = {
    "conv": (3, WIDTH, 6),
    "norm": dict.fromkeys(("mean", "var", "scale", "bias"), (6,)),
    "q": (6, 2, 3),
    "k": (6, 2, 3),
    "u": (6, 2, 3),
    "o": (2, 3, 6),
    "w": (6, 5),
    "d": (5, 6),
    "bias": (6,),
    "e": (6, 3),
}


def plain(v, x):
    """A dense layer with a norm at every position, a pool, and two dense layers."""
    m = x["mask"]
    h = jax.nn.relu(norm(v["norm"], x["u"] @ v["w"])) * m[..., None]
    pool = h.sum(1) / m.sum(1, keepdims=True)
    return jax.nn.relu(pool @ v["d"] + jnp.broadcast_to(v["bias"], (len(pool), 6))) @ v["e"]


PLAIN = {
    "w": (WIDTH, 5),
    "norm": dict.fromkeys(("mean", "var", "scale", "bias"), (5,)),
    "d": (5, 6),
    "bias": (6,),
    "e": (6, 3),
}
# Units of the last hidden layer are alive, as dead ones leave maps undetermined.
TREES = tuple(of_shapes(PLAIN, seed) for seed in (0, 1))
TREES = tuple(tree | {"bias": tree["bias"] + 1} for tree in TREES)


def image(v, x):
    """Convolutions with strides, a window's maximum and two dense layers."""
    h = jax.nn.relu(conv(x["u"] * x["mask"][..., None], v["a"]))
    h = jax.nn.relu(conv(h * x["mask"][..., None], v["b"], 2))
    valid = x["mask"][:, ::2, ::2, None]
    h = jax.lax.reduce_window(h * valid, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    return jax.nn.relu(h.sum((1, 2)) @ v["d"]) @ v["e"]


def images(size):
    """Images of which the first four rows and columns are valid."""
    rng = np.random.default_rng(5)
    u = np.zeros((6, 8, 8, 2), np.float32)
    u[:, :4, :4] = rng.normal(size=(6, 4, 4, 2))
    u[:, 4:] = u[:, :, 4:] = 9
    mask = np.zeros((6, 8, 8), np.float32)
    mask[:, :4, :4] = 1
    return {"u": u[:, :size, :size], "mask": mask[:, :size, :size]}


IMAGE = {"a": (3, 3, 2, 3), "b": (3, 3, 3, 4), "d": (4, 5), "e": (5, 2)}


def padded(length, lengths, seed=0):
    """A batch of sequences; what stands behind their lengths is large and should not matter."""
    rng = np.random.default_rng(seed)
    mask = np.arange(length) < np.array(lengths)[:, None]
    u = rng.normal(size=(len(lengths), LONG, WIDTH)).astype(np.float32)[:, :length]
    u = np.where(mask[..., None], u, 50)
    return {"u": u.astype(np.float32), "mask": mask.astype(np.float32)}


def is_valid(x):
    return x["mask"] > 0


_NETS = {}


def net_of(fn, shapes, x):
    key = fn, x["u"].shape[1:]
    if key not in _NETS:
        _NETS[key] = vfjax.trace(fn, of_shapes(shapes, 0), x)
    return _NETS[key]


def data_of(length):
    """Two batches of different sizes, all of the short length."""
    return [padded(length, [SHORT] * n, seed) for seed, n in ((1, 5), (2, 4))]


MERGED = merge.interpolate(TREES[:2])


def _numbers(alignment):
    return alignment.permutations, alignment.objective


def _features(net, data, mask):
    found = diagnose.features(net, MERGED, data, references=TREES[:2], mask=mask)
    fields = "feature", "feature_std", "offset", "std", "variance", "dead", "feature_rms", "mean"
    return {what: (getattr(found, what), getattr(found.references, what)) for what in fields}


def _parts(model):
    return (model.trunk, model.corrections) if isinstance(model, merge.Merged) else model


def _renormalised(remedy, **options):
    def run(net, data, mask):
        given = {"references": TREES[:2], "sites": "all"} if remedy is not renorm.reset else {}
        return _parts(remedy(net, MERGED, data, mask=mask, **given, **options))

    return run


def _cut(net, data, mask):
    merged = merge.preserve_first(net, list(TREES[:2]), layers=1)
    return _parts(renorm.repair(net, merged, data, references=TREES[:2], sweeps="layer", mask=mask))


USES = {
    "moments": lambda net, data, mask: (lambda m: (m.count, m.mean, m.var, m.covariance))(
        stats.moments(net, TREES, data, sites="taps", covariance=True, mask=mask)
    ),
    "reset": _renormalised(renorm.reset),
    "repair by layer": _renormalised(renorm.repair, sweeps="layer"),
    "repair behind a cut": _cut,
    "match": lambda net, data, mask: _numbers(
        align.match_activations(net, *TREES[:2], data, mask=mask)
    ),
    "zip": lambda net, data, mask: align.zip_features(net, TREES, data, mask=mask).maps,
    "cca": lambda net, data, mask: (
        align.cca(net, TREES[:2], data, mask=mask, dtype=np.float64).maps
    ),
    "transport": lambda net, data, mask: align.transport(net, TREES[:2], data, mask=mask).maps,
    "wanda": lambda net, data, mask: prune.wanda(net, TREES[0], data, mask=mask).values,
    "features": _features,
    "cka": lambda net, data, mask: (
        diagnose.cka((net, TREES[0]), (net, TREES[1]), data, mask=mask).matrix
    ),
}


def _leaves(tree):
    leaves, structure = jax.tree.flatten(tree)
    return [np.asarray(leaf, np.float64) for leaf in leaves], structure


def same(found, wanted, tol=2e-4):
    """Equal to rounding, each leaf relative to its largest entry."""
    (left, structure), (right, other) = _leaves(found), _leaves(wanted)
    assert structure == other
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol * abs(b[np.isfinite(b)]).max(initial=0))


@pytest.mark.parametrize("use", USES)
def test_masked_padding_is_as_no_padding(use):
    longer, shorter = data_of(LONG), data_of(SHORT)
    found = USES[use](net_of(plain, PLAIN, longer[0]), longer, is_valid)
    # f(0) keeps the mask only if it is known what the mask is.
    mask = is_valid if use == "features" else None
    wanted = USES[use](net_of(plain, PLAIN, shorter[0]), shorter, mask)
    same(found, wanted)


def test_masked_padding_is_as_no_padding_beside_convolutions_and_heads():
    tree, results = of_shapes(SHAPES, 0), []
    for length, mask in ((LONG, is_valid), (SHORT, None)):
        data = data_of(length)
        net = net_of(sequence, SHAPES, data[0])
        found = stats.moments(net, [tree], data, sites="taps", covariance=True, mask=mask)
        scores = prune.wanda(net, tree, data, mask=mask).values
        results.append((found.count, found.mean, found.var, found.covariance, scores))
    same(*results)


def test_strided_maps_count_where_their_positions_do():
    larger, smaller = images(8), images(4)
    found, wanted = (
        stats.moments(net_of(image, IMAGE, x), [of_shapes(IMAGE, 3)], [x], sites="layers", mask=m)
        for x, m in ((larger, is_valid), (smaller, None))
    )
    assert found.count == wanted.count == {"a": 6 * 16, "b": 6 * 4, "d": 6, "e": 6}
    same((found.mean, found.var), (wanted.mean, wanted.var))


# ------------------------------------------------------------------------------ networks by hand


def pooled(v, x):
    """Two dense layers at every position, the mean of the valid ones, and a dense layer."""
    h = jax.nn.relu(x["u"] @ v["a"] + 1) @ v["b"]
    m = x["mask"]
    return ((h * m[..., None]).sum(1) / m.sum(1, keepdims=True)) @ v["c"]


POOLED = {"a": (WIDTH, 5), "b": (5, 3), "c": (3, 2)}
LENGTHS = (2, 1, 3, 2, 3), (1, 0, 3), (0, 0)


def ragged(length=SHORT):
    return [padded(length, lengths, seed) for seed, lengths in enumerate(LENGTHS)]


def by_hand(tree, data):
    """The values of each layer at every valid position, and which example they are of."""
    sums = {"a": [], "b": [], "c": []}
    for x in data:
        for u, m in zip(x["u"], x["mask"] > 0, strict=True):
            if m.any():
                a = u[m] @ np.asarray(tree["a"])
                b = np.maximum(a + 1, 0) @ np.asarray(tree["b"])
                for name, value in zip("abc", (a, b, b.mean(0)[None] @ tree["c"]), strict=True):
                    sums[name].append(np.asarray(value, np.float64))
    return sums


@pytest.fixture(scope="module")
def pool_net():
    return net_of(pooled, POOLED, ragged()[0])


def test_moments_are_those_of_the_valid_positions(pool_net):
    tree, data = of_shapes(POOLED, 1), ragged()
    found = stats.moments(pool_net, [tree], data, sites="layers", covariance=["b"], mask=is_valid)
    assert found.count == {"a": 15, "b": 15, "c": 7}
    for name, values in by_hand(tree, data).items():
        rows = np.concatenate(values)
        same((found.mean[name][0], found.var[name][0]), (rows.mean(0), rows.var(0)))
    rows = np.concatenate(by_hand(tree, data)["b"])
    same(found.covariance["b"][0, 0], np.cov(rows.T, bias=True))


def test_features_are_norms_over_the_valid_positions(pool_net):
    tree, data = of_shapes(POOLED, 1), ragged()
    found = diagnose.features(pool_net, tree, data, sites="layers", mask=is_valid)
    empty = [x | {"u": 0 * x["u"]} for x in data]
    values, offsets = by_hand(tree, data), by_hand(tree, empty)
    for name in "abc":
        norms = [np.linalg.norm(v - o) for v, o in zip(values[name], offsets[name], strict=True)]
        rows = np.concatenate(values[name])
        same(found.feature[name], np.array([np.mean(norms)]))
        same(found.feature_std[name], np.array([np.std(norms)]))
        lengths = [np.linalg.norm(o) for o in offsets[name]]
        same(found.offset[name], np.array([np.mean(lengths)]))
        same((found.mean[name][0], found.std[name][0]), (rows.mean(0), rows.std(0)))


def test_features_of_tokens_whose_mask_is_all_that_there_is():
    """The input 0 is the token 0, at the positions that count in an example."""
    tree = of_shapes({"e": (7, 4), "w": (4, 3)}, 0)
    ids = np.array([[1, 2, 0], [3, 0, 0], [6, 5, 4]], np.int32)
    net = vfjax.trace(lambda v, x: v["e"][x] @ v["w"], tree, ids)
    found = diagnose.features(net, tree, [ids], sites=["w"], mask=lambda x: x != 0)
    rows = np.asarray(tree["e"] @ tree["w"])
    norms = [np.linalg.norm(rows[one[one > 0]] - rows[0]) for one in ids]
    offsets = [np.linalg.norm(rows[0]) * np.sqrt((one > 0).sum()) for one in ids]
    same(found.feature["w"], np.array([np.mean(norms)]))
    same(found.offset["w"], np.array([np.mean(offsets)]))


def test_wanda_takes_the_valid_inputs(pool_net):
    tree, data = of_shapes(POOLED, 1), ragged()
    inputs = np.concatenate([x["u"][x["mask"] > 0] for x in data])
    size = np.sqrt(np.square(inputs).sum(0) / 7)  # seven examples have a valid position
    same(
        prune.wanda(pool_net, tree, data, mask=is_valid).values["a"],
        np.abs(tree["a"]) * size[:, None],
    )


@pytest.mark.parametrize("estimator", ["exact", "minibatch"])
def test_examples_without_a_valid_position_are_as_absent(pool_net, estimator):
    one, other = ((pool_net, of_shapes(POOLED, seed)) for seed in (1, 2))
    data = padded(SHORT, [3, 0, 3, 3, 0, 3, 3])
    kept = jax.tree.map(lambda a: a[[0, 2, 3, 5, 6]], data)
    found = diagnose.cka(one, other, [data], mask=is_valid, estimator=estimator)
    wanted = diagnose.cka(one, other, [kept], estimator=estimator)
    assert found.examples == wanted.examples == 5
    same(found.matrix, wanted.matrix)


def test_what_stands_in_padding_does_not_matter_for_similarity(pool_net):
    one, other = ((pool_net, of_shapes(POOLED, seed)) for seed in (1, 2))
    data = ragged()[:1]
    noisy = [x | {"u": np.where(x["mask"][..., None] > 0, x["u"], -3 * x["u"] + 7)} for x in data]
    results = [diagnose.cka(one, other, d, mask=is_valid, sites="layers") for d in (data, noisy)]
    same(results[0].matrix, results[1].matrix)
    assert (np.abs(results[0].matrix) <= 1).all()


@pytest.mark.parametrize("use", ["moments", "features", "reset"])
def test_a_mask_that_is_all_true_is_no_mask(use):
    data = data_of(SHORT)
    net = net_of(plain, PLAIN, data[0])
    if use == "features":  # f(0) keeps the mask
        found = diagnose.features(net, TREES[0], data, sites=["w"], mask=is_valid)
        wanted = diagnose.features(net, TREES[0], data, sites=["w"])
        same((found.feature, found.variance), (wanted.feature, wanted.variance))
        return
    same(USES[use](net, data, is_valid), USES[use](net, data, None))


def test_sharded_batches_are_masked_alike(pool_net):
    tree, data = of_shapes(POOLED, 1), [padded(SHORT, [3, 1, 2, 0, 3, 1, 2, 2])]
    mesh = jax.make_mesh((4,), ("data",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = [jax.device_put(x, placed) for x in data]
    found, wanted = (
        stats.moments(pool_net, [tree], d, sites="layers", mask=is_valid) for d in (sharded, data)
    )
    same((found.count, found.mean, found.var), (wanted.count, wanted.mean, wanted.var))


def test_another_mask_compiles_nothing(pool_net):
    tree, data = of_shapes(POOLED, 1), ragged()
    stats.moments(pool_net, [tree], data, sites="layers", mask=lambda x: x["mask"] > 0)
    with Compilations() as compilations:
        stats.moments(pool_net, [tree], data, sites="layers", mask=lambda x: x["mask"] > 0)
    assert compilations.count == 0


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (np.ones((5, 3), bool), TypeError, "`mask` must be a function of x to booleans, got ndarr"),
        (lambda x: x["mask"], TypeError, r"must be an array of booleans.*got float32 \[5, 3\]"),
        (lambda x: True, TypeError, "must be an array of booleans.*got bool"),
        (lambda x: x["mask"][1:] > 0, ValueError, r"`mask` of `data`, batch 0 must have shape"),
        (lambda x: x["mask"].T > 0, ValueError, r"along the leading axes.*got \[3, 5\]"),
        (lambda x: x["mask"] > 1, ValueError, "no position of `data`"),
    ],
)
def test_what_is_no_mask_is_refused(pool_net, mask, error, words):
    tree = of_shapes(POOLED, 1)
    with pytest.raises(error, match=words):
        stats.moments(pool_net, [tree], ragged()[:1], sites="layers", mask=mask)


def test_a_mask_needs_what_it_masks(pool_net):
    tree = of_shapes(POOLED, 1)
    with pytest.raises(ValueError, match="mask is not read"):
        align.transport(pool_net, [tree, tree], on="weights", mask=is_valid)
    moments = stats.moments(pool_net, [tree] * 2, ragged()[:1], sites="taps", covariance="cross")
    with pytest.raises(ValueError, match="`moments` are given"):
        align.match_activations(pool_net, tree, tree, None, moments=moments, mask=is_valid)
