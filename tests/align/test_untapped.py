"""Groups that show after no layer: states of recurrent cells, and what lies inside loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import vfjax
from helpers import assert_close, lively, traced
from vfjax import align, prune

H = 5
X = np.random.default_rng(1).normal(size=(30, 4, 3)).astype(np.float32)


def lstm(p, x):
    def cell(state, x):
        h, c = state
        i, g, f, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"][None], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[0], H))
    return lax.scan(cell, (zero, zero), x.swapaxes(0, 1))[1][-1] @ p["head"]


def gru(p, x):
    """A cell whose last state alone leaves the loop."""

    def cell(h, x):
        r, z, a = jnp.split(x @ p["wx"] + p["b"][None], 3, axis=-1)
        rh, zh, ah = jnp.split(h @ p["wh"], 3, axis=-1)
        z = jax.nn.sigmoid(z + zh)
        return (1 - z) * jnp.tanh(a + jax.nn.sigmoid(r + rh) * ah) + z * h, None

    return lax.scan(cell, jnp.zeros((x.shape[0], H)), x.swapaxes(0, 1))[0] @ p["head"]


def hidden(p, x):
    """Units inside a loop over examples, which leave it nowhere."""
    one = lambda x: jnp.tanh(x.sum(0) @ p["wx"] + p["b"]) @ p["wh"]  # noqa: E731
    return lax.map(one, x) @ p["head"]


def shapes_of(gates):
    return {"wx": (3, gates * H), "wh": (H, gates * H), "b": (gates * H,), "head": (H, 2)}


CELLS = {lstm: shapes_of(4), gru: shapes_of(3)}


def copy_of(tree, gates, order):
    """The tree with its hidden units in another order, by NumPy."""
    along = np.concatenate([order + H * k for k in range(gates)])
    new = {name: np.array(leaf) for name, leaf in tree.items()}
    new["wx"], new["b"] = new["wx"][:, along], new["b"][along]
    new["wh"], new["head"] = new["wh"][order][:, along], new["head"][order]
    return new


ORDER = np.array([3, 0, 4, 1, 2])


@pytest.mark.parametrize("fn", CELLS, ids=lambda fn: fn.__name__)
def test_states_of_recurrent_cells_are_matched_by_activations(fn):
    net, tree = traced(fn, CELLS[fn], X.shape), lively(CELLS[fn], 0)
    copy = copy_of(tree, len(tree["b"]) // H, ORDER)
    assert_close(net.run(copy, X), net.run(tree, X), 1e-5)
    assert {tap.name.split("#")[0] for tap in net.taps} == {"wx:loop"}
    found = align.match_activations(net, tree, copy, [X])
    assert not found.by_weights + found.unmatched and found.moved == H
    assert found.objective[0] == pytest.approx(H * len(net.taps), rel=1e-4)
    for matcher in (align.zip_features, align.cca, align.transport):
        maps = matcher(net, [tree, copy], [X])
        assert not maps.by_weights + maps.unmatched
        for name, leaf in maps.apply(net, [tree, copy])[1].items():
            assert_close(leaf, tree[name], 1e-5)


def test_what_a_loop_returns_is_a_site():
    net, tree = traced(lstm, CELLS[lstm], X.shape), lively(CELLS[lstm], 0)
    shown = {name: site.kind for name, site in net.sites.items() if ":loop" in name}
    assert set(shown.values()) == {"loop"} and len(shown) >= 1
    out, values = net.run(tree, X, capture=list(shown))
    last = [v for v in values.values() if v.ndim == 3]
    assert_close(last[0][-1] @ tree["head"], out, 1e-5)
    moments = vfjax.stats.moments(net, [tree], [X], sites=list(shown))
    for name, value in values.items():
        assert_close(moments.mean[name][0], np.asarray(value).reshape(-1, H).mean(0), 1e-5)


def test_groups_that_no_data_shows_are_matched_by_weights():
    shapes = {"wx": (3, H), "b": (H,), "wh": (H, 6), "head": (6, 2)}
    net, tree = traced(hidden, shapes, X.shape), lively(shapes, 0)
    copy = {**tree, "wx": tree["wx"][:, ORDER], "b": tree["b"][ORDER], "wh": tree["wh"][ORDER]}
    assert_close(net.run(copy, X), net.run(tree, X), 1e-5)
    found = align.match_activations(net, tree, copy, [X])
    assert found.by_weights == ("wx",) and found.unmatched == ()
    assert "1 group by weights" in repr(found)
    for name, leaf in net.spec.permute(copy, found.permutations).items():
        np.testing.assert_array_equal(leaf, tree[name])
    for matcher in (align.zip_features, align.cca, align.transport):
        maps = matcher(net, [tree, copy], [X])
        assert maps.by_weights == ("wx",)
        for name, leaf in maps.apply(net, [tree, copy])[1].items():
            assert_close(leaf, tree[name], 1e-5)
        maps = matcher(net, [tree, copy], [X], untapped="keep")
        assert maps.unmatched == ("wx",) and "wx" not in maps.maps[1]
    universe = align.match_universe(net, [tree, copy, tree], [X])
    assert universe.by_weights == ("wx",)
    first, *others = universe.apply(net, [tree, copy, tree])
    for other in others:
        for name, leaf in other.items():
            np.testing.assert_array_equal(leaf, first[name])


def test_groups_that_are_left_in_their_order_are_named():
    shapes = {"wx": (3, H), "b": (H,), "wh": (H, 6), "head": (6, 2)}
    net, tree = traced(hidden, shapes, X.shape), lively(shapes, 0)
    found = align.match_activations(net, tree, tree, [X], untapped="keep")
    assert found.unmatched == ("wx",) and "1 group not matched" in repr(found)
    moments = vfjax.stats.moments(net, [tree] * 2, [X], sites="taps", covariance=True)
    assert align.match_moments(net, moments).unmatched == ("wx",)
    assert align.match_universe_moments(net, moments).unmatched == ("wx",)
    for matcher in (align.zip_moments, align.cca_moments, align.transport_moments):
        assert matcher(net, moments).unmatched == ("wx",)
    with pytest.raises(ValueError, match='`untapped` must be "weights" or "keep"'):
        align.match_activations(net, tree, tree, [X], untapped="no")


def test_a_network_without_any_tap():
    """Nothing is measured; weights match all."""

    def apply(p, x):
        return lax.map(lambda x: jnp.tanh(x.sum(0) @ p["wx"] + p["b"]) @ p["wh"], x)

    shapes = {"wx": (3, H), "b": (H,), "wh": (H, 2)}
    with pytest.warns(UserWarning, match="no layers"):
        net, tree = traced(apply, shapes, X.shape), lively(shapes, 0)
    copy = {**tree, "wx": tree["wx"][:, ORDER], "b": tree["b"][ORDER], "wh": tree["wh"][ORDER]}
    for matcher in (align.zip_features, align.cca, align.transport):
        maps = matcher(net, [tree, copy], [X])
        assert maps.by_weights == ("wx",)
        for name, leaf in maps.apply(net, [tree, copy])[1].items():
            assert_close(leaf, tree[name], 1e-6)


def test_kernels_inside_loops_are_pruned():
    net, tree = traced(lstm, CELLS[lstm], X.shape), lively(CELLS[lstm], 0)
    assert set(prune.prunable(net)) == {"head", "wx", "wh"}
    scores = prune.magnitude(net, tree)
    np.testing.assert_array_equal(scores.of("wx"), abs(tree["wx"]).T)
    masks = prune.masks(scores, 0.5)
    assert prune.sparsity(masks) == pytest.approx(0.5, abs=0.01)
    largest = np.sort(np.concatenate([abs(tree[p]).ravel() for p in ("head", "wx", "wh")]))
    assert min(abs(tree[p])[np.asarray(masks[p])].min() for p in ("wx", "wh")) >= np.median(largest)
    labelled = [(X, np.arange(30) % 2)]
    fisher = prune.fisher(net, tree, labelled)
    assert fisher.values["wh"].any()
    with pytest.warns(UserWarning, match=r"\['wh', 'wx'\] are left out"):
        assert set(prune.wanda(net, tree, [X]).rows) == {"head"}
    with pytest.raises(ValueError, match="kernels inside loops, whose inputs are not measured"):
        prune.wanda(net, tree, [X], names=["wx"])
