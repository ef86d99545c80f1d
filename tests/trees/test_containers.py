"""Trees that differ only in containers, or in how numbers are kept, are one model to all functions.

One list of every public function that takes two trees, or a tree and a mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze

import vfjax
from helpers import normal
from vfjax import align, diagnose, merge, prune, renorm, stats

# Two random networks are in no common order.
pytestmark = pytest.mark.filterwarnings("ignore:references.0. may not be in the order")

X = normal(0, 6, 3)
LABELS = np.arange(6) % 2
DATA = [(X, LABELS)]
ORDER = {"params/layers/0": np.array([2, 0, 1, 3])}


def forward(v, x):
    first, second, last = v["params"]["layers"]
    h = jax.nn.relu(x @ first["w"] + jnp.broadcast_to(first["b"], (len(x), 4)))
    h = (h - jnp.broadcast_to(v["stats"]["mean"], h.shape)) * jnp.broadcast_to(
        jax.lax.rsqrt(v["stats"]["var"] + 1e-5), h.shape
    )
    return jax.nn.relu(h @ second["w"]) @ last["w"]


def tree(seed):
    first = {"w": normal(seed, 3, 4), "b": normal(seed + 1, 4)}
    layers = [first, {"w": normal(seed + 2, 4, 4)}, {"w": normal(seed + 3, 4, 2)}]
    return {"params": {"layers": layers}, "stats": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}


def tuples(v):
    """The same tree with a tuple in place of the list, and its keys in another order."""
    return {"stats": v["stats"], "params": {"layers": tuple(v["params"]["layers"])}}


A, B = tree(1), tree(11)
MAPS = align.Maps.of_permutations([None, ORDER])
HALF = np.full((4, 4), 0.25, np.float32)
MIXED = align.Maps(({}, {"params/layers/0": (HALF, HALF)}))


@functools.cache
def net():
    return vfjax.trace(forward, A, X)


def mask(v):
    """Half of the weights; biases and statistics are left whole, by a single True."""
    return prune.masks(prune.magnitude(net(), v), 0.5)


USES = {
    "interpolate": lambda a, b: merge.interpolate([a, b]),
    "uniform_soup": lambda a, b: merge.uniform_soup([a, b]),
    "greedy_soup": lambda a, b: merge.greedy_soup([a, b], lambda v: 1.0),
    "ensemble": lambda a, b: merge.ensemble(net(), [a, b])(X),
    "preserve_first": lambda a, b: merge.preserve_first(net(), [a, b], layers=1)(X),
    "partial": lambda a, b: merge.partial(net(), [a, b], MAPS, span=slice(0, 2))(X),
    "partial, mixed": lambda a, b: merge.partial(net(), [a, b], MIXED, span=slice(1, 3)).trunk,
    "as_merged": lambda a, b: merge.as_merged(net(), b)(X),
    "maps": lambda a, b: MAPS.apply(net(), [a, b]),
    "permute": lambda a, b: net().spec.permute(b, ORDER),
    "match_weights": lambda a, b: (
        align.match_weights(net(), a, b, key=jax.random.key(0)).permutations
    ),
    "match_activations": lambda a, b: align.match_activations(net(), a, b, DATA).permutations,
    "match_universe": lambda a, b: align.match_universe(net(), [a, b], DATA).permutations,
    "zip_features": lambda a, b: align.zip_features(net(), [a, b], DATA).maps,
    "cca": lambda a, b: align.cca(net(), [a, b], DATA).maps,
    "transport": lambda a, b: align.transport(net(), [a, b], DATA).maps,
    "moments": lambda a, b: stats.moments(net(), [a, b], DATA, sites="layers"),
    "reset": lambda a, b: renorm.reset(net(), b, DATA),
    "repair": lambda a, b: renorm.repair(net(), b, DATA, references=[a, b]),
    "rescale": lambda a, b: renorm.rescale(net(), a, DATA, references=[b]),
    "calibrate_bias": lambda a, b: renorm.calibrate_bias(net(), b, references=[a, b]),
    "features": lambda a, b: diagnose.features(net(), [a, b], DATA),
    "report": lambda a, b: repr(diagnose.report(net(), b, DATA, references=[a, b])),
    "cka": lambda a, b: diagnose.cka((net(), a), (net(), b), DATA),
    "distance": lambda a, b: diagnose.distance(a, b),
    "interpolation": lambda a, b: diagnose.interpolation(net(), [a, b], DATA, alphas=3),
    "interpolation, partial": lambda a, b: diagnose.interpolation(
        net(), [a, b], DATA, alphas=3, layers=1
    ),
    "apply": lambda a, b: prune.apply(b, mask(a)),
    "keep": lambda a, b: prune.keep(mask(a)).update(b, None)[0],
    "fisher": lambda a, b: prune.fisher(net(), b, DATA).values,
    "woodfisher": lambda a, b: prune.inverse_fisher(net(), a, DATA, count=6).prune(b, mask(a)),
}


@pytest.mark.parametrize("use", USES)
def test_containers_make_no_difference(use):
    wanted = USES[use](A, B)
    found = USES[use](A, freeze(tuples(B)))
    names, others = (
        [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        for leaves in map(jax.tree_util.tree_leaves_with_path, (found, wanted))
    )
    assert sorted(names) == sorted(others)
    by_name = dict(zip(others, jax.tree.leaves(wanted), strict=True))
    for name, leaf in zip(names, jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(leaf, by_name[name], err_msg=name)


@pytest.mark.parametrize("use", USES)
def test_how_numbers_are_kept_makes_no_difference(use):
    """In another byte order, and in a type that JAX narrows: trees that come back keep it."""
    a, b = (
        jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf).astype(dtype), tree)
        for tree, dtype in ((A, "float64"), (B, ">f8"))
    )
    wanted, found = USES[use](A, B), USES[use](a, b)
    for one, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        if hasattr(one, "dtype"):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)
    if jax.tree.structure(found) == jax.tree.structure(A):
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype("float64")}


@pytest.mark.parametrize("whole", [True, np.True_, np.array(True), jnp.array(True)], ids=type)
def test_a_mask_is_permuted_with_its_network(whole):
    """Pruned and then permuted is permuted and then pruned, though a single True has no axes."""
    kept = jax.tree.map(lambda leaf: leaf if np.ndim(leaf) else whole, mask(A))
    assert not np.ndim(kept["stats"]["var"])
    moved = net().spec.permute(kept, ORDER)
    wanted = net().spec.permute(prune.apply(A, kept), ORDER)
    found = prune.apply(net().spec.permute(A, ORDER), moved)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert moved["params"]["layers"][0]["w"].dtype == bool
    assert prune.sparsity(moved) == prune.sparsity(kept)
    # A single number is not a mask: it has no axis to permute, and says so.
    with pytest.raises(ValueError, match="axis 0 of 'stats/var' is out of range"):
        net().spec.permute({**A, "stats": {**A["stats"], "var": 1.0}}, ORDER)


def test_a_network_whose_variables_are_a_list():
    """Of trees in a list, and of a list that is one tree, the leaves tell which it is."""
    a, b = (normal(1, 3, 4), normal(2, 4, 2)), (normal(3, 3, 4), normal(4, 4, 2))
    own = vfjax.trace(lambda v, x: jax.nn.relu(x @ v[0]) @ v[1], a, X)
    alone = diagnose.features(own, a, [X])
    for given in (list(a), [list(a)], (a,)):
        found = diagnose.features(own, given, [X])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(found), jax.tree.leaves(alone))
    assert len(jax.tree.leaves(diagnose.features(own, [list(a), b], [X]))) > 0
    mean = merge.interpolate([a, list(b)])
    np.testing.assert_array_equal(mean[1], (a[1] + b[1]) / 2)


def test_a_mask_of_another_tree_is_named():
    kept = mask(A)
    del kept["stats"]["var"]
    with pytest.raises(ValueError, match="Only one of them has 'stats/var'"):
        prune.apply(A, kept)
