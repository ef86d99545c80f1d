"""Complex networks: what is supported is right, and all else is refused by name, never cast.

A cast would warn ("Casting complex values to real"), and warnings are errors here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import align, checkpoint, diagnose, merge, prune, renorm, stats

SHAPES = {"a": (4, 5), "bias": (5,), "b": (5, 3), "c": (3, 2)}


def apply_fn(v, x):
    h = x @ v["a"] + jnp.broadcast_to(v["bias"], (len(x), 5))
    h = h * jax.nn.sigmoid(jnp.abs(h))
    return jnp.abs(jnp.tanh(h @ v["b"]) @ v["c"])


def tree(seed):
    rng = np.random.default_rng(seed)
    draw = {name: (rng.normal(size=s), rng.normal(size=s)) for name, s in SHAPES.items()}
    return {name: (one + 1j * other).astype(np.complex64) for name, (one, other) in draw.items()}


A, B = tree(0), tree(1)
X = np.random.default_rng(2).normal(size=(6, 4)).astype(np.float32)
LABELS = np.array([0, 1, 0, 1, 1, 0])
NET = vfjax.trace(apply_fn, A, X)
ORDERS = {"a": np.array([3, 1, 4, 0, 2]), "b": np.array([2, 0, 1])}
BACK = {group: np.argsort(order) for group, order in ORDERS.items()}


def test_averages_are_complex():
    merged = merge.interpolate([A, B], weights=[0.25, 0.75])
    for name, leaf in merged.items():
        assert leaf.dtype == np.complex64
        np.testing.assert_allclose(leaf, 0.25 * A[name] + 0.75 * B[name], rtol=1e-6)


def test_weights_recover_a_permuted_copy():
    moved = NET.spec.permute(A, ORDERS)
    found = align.match_weights(NET, A, moved, key=jax.random.key(0))
    size = sum(np.square(np.abs(leaf)).sum() for leaf in A.values())
    np.testing.assert_allclose(found.objective[-1], size, rtol=1e-5)
    universe = align.match_universe(NET, [A, moved], key=jax.random.key(0)).pairwise(to=0, model=1)
    maps = align.transport(NET, [A, moved], on="weights")
    for group, order in BACK.items():
        assert found.permutations[group].tolist() == universe[group].tolist() == order.tolist()
        assert maps.maps[1][group][0].argmax(1).tolist() == order.tolist()


def test_the_imaginary_part_decides_too():
    turned = {name: 1j * leaf.real.astype(np.complex64) for name, leaf in A.items()}
    found = align.match_weights(
        NET, turned, NET.spec.permute(turned, ORDERS), key=jax.random.key(0)
    )
    assert {g: p.tolist() for g, p in found.permutations.items()} == {
        g: p.tolist() for g, p in BACK.items()
    }


def test_scores_are_of_absolute_values():
    values = prune.magnitude(NET, A).values["a"]
    np.testing.assert_allclose(values, np.abs(A["a"]), rtol=1e-6)
    h = X @ A["a"] + A["bias"]
    h = h / (1 + np.exp(-np.abs(h)))
    wanted = np.abs(A["b"]) * np.sqrt(np.square(np.abs(h)).mean(0))[:, None]
    np.testing.assert_allclose(prune.wanda(NET, A, [X]).values["b"], wanted, rtol=1e-5)


def test_kernels_are_compared_by_absolute_values():
    merged = merge.interpolate([A, B])
    found = diagnose.rescale_product(NET, merged, [A, B])
    size = {name: np.abs(leaf).mean() for name, leaf in A.items()}
    other = {name: np.abs(leaf).mean() for name, leaf in B.items()}
    ratio = (size["a"] + other["a"]) / 2 / np.abs(merged["a"]).mean()
    np.testing.assert_allclose(found["a"], ratio, rtol=1e-6)


def test_a_checkpoint_keeps_complex_leaves(tmp_path):
    checkpoint.save(tmp_path / "model", A)
    loaded = checkpoint.load(tmp_path / "model")
    for name, leaf in A.items():
        np.testing.assert_array_equal(loaded[name], leaf)


MERGED = merge.interpolate([A, B])
REFUSED = {
    "moments": lambda: stats.moments(NET, [A], [X], sites="layers"),
    "repair": lambda: renorm.repair(NET, MERGED, [X], references=[A, B], sites="all"),
    "rescale": lambda: renorm.rescale(NET, MERGED, [X], references=[A, B], sites="all"),
    "match": lambda: align.match_activations(NET, A, B, [X]),
    "universe": lambda: align.match_universe(NET, [A, B], [X]),
    "zip": lambda: align.zip_features(NET, [A, B], [X]),
    "cca": lambda: align.cca(NET, [A, B], [X]),
    "transport": lambda: align.transport(NET, [A, B], [X]),
    "features": lambda: diagnose.features(NET, A, [X]),
    "report": lambda: diagnose.report(NET, MERGED, [X], references=[A, B]),
    "cka": lambda: diagnose.cka((NET, A), (NET, B), [X]),
    "fisher": lambda: prune.fisher(NET, A, [(X, LABELS)]),
    "woodfisher": lambda: prune.woodfisher(NET, A, [(X, LABELS)], count=2),
}


@pytest.mark.parametrize("use", REFUSED)
def test_what_takes_real_numbers_says_where_complex_ones_are(use):
    with pytest.raises(TypeError, match=r"['\"]a(:act)?['\"].*complex"):
        REFUSED[use]()


def test_real_sites_of_complex_networks_are_measured():
    found = stats.moments(NET, [A], [X], sites=["output"])
    wanted = np.asarray(NET.run(A, X)).mean(0)
    np.testing.assert_allclose(found.mean["output"][0], wanted, rtol=1e-5)


def test_complex_corrections_of_real_layers_are_refused():
    v, x = {"w": np.eye(2, dtype=np.float32)}, np.ones((1, 2), np.float32)
    net = vfjax.trace(lambda v, x: x @ v["w"], v, x)
    with pytest.raises(TypeError, match="complex"):
        net.fold(v, "w", np.full(2, 1j), None)
    with pytest.raises(TypeError, match="complex"):
        net.layer("w").affine(np.full(2, 1j), np.zeros(2))(x)
