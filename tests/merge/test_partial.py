"""Partial merges: stems, trunk and heads, and the maps between their bases."""

from __future__ import annotations

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import along, assert_close, conv, initial, norm, traced
from vfjax import checkpoint, merge
from vfjax._trees import flatten_named, with_leaves
from vfjax.align import Maps
from vfjax.network._crossing import mapped_value
from vfjax.symmetry._places import Axis, Place

ROUNDING = 2e-5


def close(actual, expected, tol=ROUNDING):
    assert_close(actual, expected, tol, least=1e-9)


def dense(x, w, b):
    x = x @ w
    return x + along(b, x)


def mlp(v, x):
    for i in (1, 2, 3):
        x = jax.nn.relu(dense(x, v[f"w{i}"], v[f"b{i}"]))
    return dense(x, v["w4"], v["b4"])


def chain(v, x):
    for i in (1, 2, 3):
        x = jax.nn.relu(norm(v[f"n{i}"], conv(x, v[f"w{i}"])))
    return dense(x.mean((1, 2)), v["w4"], v["b4"])


def residual(v, x):
    x = jax.nn.relu(norm(v["n0"], conv(x, v["w0"])))
    for i in (1, 3):
        y = jax.nn.relu(norm(v[f"n{i}"], conv(x, v[f"w{i}"])))
        x = jax.nn.relu(x + norm(v[f"n{i + 1}"], conv(y, v[f"w{i + 1}"])))
    return x.mean((1, 2)) @ v["w5"]


def attention(v, x):
    x = x @ v["embed"]
    q, k, u = (jnp.einsum("btd,dhe->bthe", x, v[name]) for name in "qku")
    scores = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k), axis=-1)
    x = x + jnp.einsum("bhts,bshe->bthe", scores, u).reshape(*x.shape[:2], -1) @ v["o"]
    x = x + jax.nn.gelu(x @ v["m1"]) @ v["m2"]
    return x.mean(1) @ v["head"]


def normal(rng, *shape):
    return jnp.asarray(
        rng.standard_normal(shape) / np.sqrt(max(np.prod(shape[:-1]), 1)), jnp.float32
    )


def norms(rng, n):
    return {
        "mean": 0.1 * normal(rng, n),
        "var": 0.5 + jnp.abs(normal(rng, n)),
        "scale": 1 + 0.1 * normal(rng, n),
        "bias": 0.1 * normal(rng, n),
    }


def draw(name, seed, classes=3):
    rng = np.random.default_rng([seed, len(name)])
    if name == "mlp":
        sizes = (4, 6, 7, 5, classes)
        found = {
            f"w{i}": normal(rng, a, b) for i, (a, b) in enumerate(itertools.pairwise(sizes), 1)
        }
        return found | {f"b{i}": 0.1 * normal(rng, n) for i, n in enumerate(sizes[1:], 1)}
    if name == "chain":
        sizes = (2, 4, 5, 6)
        found = {
            f"w{i}": normal(rng, 3, 3, a, b)
            for i, (a, b) in enumerate(itertools.pairwise(sizes), 1)
        }
        found |= {f"n{i}": norms(rng, n) for i, n in enumerate(sizes[1:], 1)}
        return found | {"w4": normal(rng, 6, classes), "b4": normal(rng, classes)}
    if name == "residual":
        sizes = [(2, 5), (5, 4), (4, 5), (5, 6), (6, 5)]
        found = {f"w{i}": normal(rng, 3, 3, *s) for i, s in enumerate(sizes)}
        found |= {f"n{i}": norms(rng, s[1]) for i, s in enumerate(sizes)}
        return found | {"w5": normal(rng, 5, classes)}
    shapes = {"embed": (3, 8), "o": (8, 8), "m1": (8, 6), "m2": (6, 8), "head": (8, classes)}
    shapes |= dict.fromkeys("qku", (8, 2, 4))
    return {key: normal(rng, *shape) for key, shape in shapes.items()}


APPLY = {"mlp": mlp, "chain": chain, "residual": residual, "attention": attention}
INPUT = {"mlp": (5, 4), "chain": (5, 6, 6, 2), "residual": (5, 6, 6, 2), "attention": (5, 4, 3)}


def case(name, models=2):
    x = jnp.float32(np.random.default_rng(3).normal(size=INPUT[name]))
    trees = [draw(name, seed) for seed in range(models)]
    return traced(APPLY[name], jax.tree.map(jnp.shape, trees[0]), x.shape), trees, x


def slices(depth):
    return [slice(a, b) for a in range(depth + 1) for b in range(a, depth + 1)]


@pytest.fixture(params=list(APPLY))
def name(request):
    return request.param


def random_labels(net, models):
    """By group, which merged feature each feature of any model goes to; none is left empty."""
    rng = np.random.default_rng(1)
    return {
        group: rng.permutation(
            np.concatenate([np.arange(n), rng.integers(n, size=(models - 1) * n)])
        )
        for group, n in net.spec.sizes.items()
    }


def zip_of(name, models=2):
    """Every group's features merged at random, within models and between them."""
    net, trees, x = case(name, models)
    return net, trees, x, Maps.of_labels(random_labels(net, models), models)


def same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_merging_a_model_with_itself_changes_nothing(name):
    net, (tree, _), x = case(name)
    expected = net.run(tree, x)
    for merged in slices(net.depth):
        model = merge.partial(net, [tree, tree, tree], span=merged)
        out = model(x)
        assert model.span == merged
        if merged.stop == net.depth:
            close(out, expected)
        else:
            assert len(out) == 3
            for found in out:
                close(found, expected)


def test_preserve_first_is_the_case_without_heads(name):
    net, trees, x = case(name)
    for layers in range(net.depth + 1):
        ours = merge.partial(net, trees, span=slice(layers, None), alpha=0.25)
        theirs = merge.preserve_first(net, trees, layers=layers, weights=(0.75, 0.25))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_array_equal(a, b)


def test_zips_merge_every_range_of_layers(name):
    net, trees, x, found = zip_of(name)
    assert found.mixed
    for merged in slices(net.depth):
        model = merge.partial(net, trees, found, span=merged)
        if found.unknown(net) & net.trunk_leaves(merged.start, merged.stop):
            with pytest.raises(ValueError, match=r"renorm\.reset"):
                model(x)
            continue
        for out in jax.tree.leaves(model(x)):
            assert out.shape == net.run(trees[0], x).shape and np.isfinite(out).all()


def test_nothing_merged_returns_every_models_own_outputs(name):
    net, trees, x, found = zip_of(name)
    for maps in (None, found):
        model = merge.partial(net, trees, maps, span=slice(None, 0))
        assert model.cut == model.end == 0 and not model.stems
        for out, tree in zip(model(x), trees, strict=True):
            np.testing.assert_array_equal(out, net.run(tree, x))


# ------------------------------------------------------------------------------------------- limits


def test_merging_all_layers_is_the_average_of_mapped_trees(name):
    net, trees, _, found = zip_of(name, 3)
    expected = merge.interpolate(found.apply(net, trees))
    for merged in (slice(None), slice(0, None), slice(None, net.depth), slice(-net.depth, 99)):
        model = merge.partial(net, trees, found, span=merged)
        assert model.cut == 0 and model.end is None and not (model.stems or model.heads)
        same(model.trunk, expected)


def test_keeping_all_layers_apart_is_the_ensemble(name):
    net, trees, x, found = zip_of(name, 3)
    model = merge.partial(net, trees, found, span=slice(net.depth, None))
    close(model(x), np.mean([net.run(tree, x) for tree in trees], 0))
    assert model.params == merge.ensemble(net, trees).params


def test_permutations_as_maps_are_trees_permuted_beforehand(name):
    net, trees, x = case(name, 3)
    moves = [{}, *(net.spec.random(jax.random.key(k)) for k in (1, 2))]
    found = Maps.of_permutations(moves)
    assert not found.mixed and not found.unknown(net)
    moved = [net.spec.permute(t, p) if p else t for t, p in zip(trees, moves, strict=True)]
    for one, two in zip(found.apply(net, trees), moved, strict=True):
        same(one, two)
    for layers in range(net.depth + 1):
        ours = merge.partial(net, trees, found, span=slice(layers, None))
        assert not ours.merge  # nothing is left to be mapped
        theirs = merge.preserve_first(net, moved, layers=layers)
        close(ours(x), theirs(x))
        assert (ours.params, ours.flops) == (theirs.params, theirs.flops)
        heads = merge.partial(net, trees, found, span=slice(None, layers))
        expected = merge.partial(net, moved, span=slice(None, layers))
        for one, two in zip(jax.tree.leaves(heads(x)), jax.tree.leaves(expected(x)), strict=True):
            close(one, two)


# --------------------------------------------------------------------------- what crosses, and maps


def merged_by_hand(labels, group, values, models):
    """The mean of all features of equal label, of all models, on the last axis."""
    label = np.split(labels[group], models)
    n = values[0].shape[-1]
    total = np.zeros((*values[0].shape[:-1], n))
    count = np.bincount(labels[group], minlength=n)
    for value, own in zip(values, label, strict=True):
        for feature, slot in enumerate(own):
            total[..., slot] += np.asarray(value)[..., feature]
    return total / count


@pytest.mark.parametrize("models", [2, 3])
def test_stems_and_heads_are_in_the_models_own_bases(models):
    """Both ends of a chain, against means and copies of features by their labels."""
    net, trees, x = case("mlp", models)
    labels = random_labels(net, models)
    found = Maps.of_labels(labels, models)
    assert found.mixed == {"w1", "w2", "w3"}
    model = merge.partial(net, trees, found, span=slice(1, 3))
    first = [net.run(tree, x, capture=["w1"])[1]["w1"] for tree in trees]
    z = merged_by_hand(labels, "w1", first, models)
    close(model.crossing(x).values[0], z)
    # Of mapped kernels and biases, the mean; all groups' labels apply at once.
    mean = merge.interpolate(found.apply(net, trees))
    for k in (2, 3):
        z = np.maximum(z, 0) @ np.asarray(mean[f"w{k}"]) + np.asarray(mean[f"b{k}"])
    own = np.split(labels["w3"], models)
    for out, tree, label in zip(model(x), trees, own, strict=True):
        unmerged = np.maximum(z, 0)[..., label]
        close(out, unmerged @ np.asarray(tree["w4"]) + np.asarray(tree["b4"]))


def test_a_linear_network_merged_within_a_model():
    """Both features of each model are copies, merged within it: nothing is lost."""
    square = {"w": jnp.eye(2), "v": jnp.eye(2)}
    net = vfjax.trace(lambda v, x: x @ v["w"] @ v["v"], square, jnp.ones((1, 2)))
    a = {"w": jnp.array([[1.0, 1.0], [2.0, 2.0]]), "v": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
    b = {"w": jnp.array([[5.0, 5.0], [0.0, 0.0]]), "v": jnp.array([[2.0, 1.0], [1.0, 1.0]])}
    found = Maps.of_labels({"w": np.array([0, 0, 1, 1])}, 2)
    x = jnp.array([[1.0, 1.0]])
    # Features of a are (3, 3), those of b (5, 5): merged they are (3, 5).
    model = merge.partial(net, [a, b], found, span=slice(None, 1))
    close(model.trunk["w"], [[1.0, 5.0], [2.0, 0.0]])
    for out, tree in zip(model(x), (a, b), strict=True):
        close(out, net.run(tree, x))
    ends = merge.partial(net, [a, b], found, span=slice(1, 1))
    close(ends.crossing(x).values[0], [[3.0, 5.0]])
    for out, tree in zip(ends(x), (a, b), strict=True):
        close(out, net.run(tree, x))
    # All merged: of the second layer the mean of U's rows, summed by label.
    whole = merge.partial(net, [a, b], found)
    close(whole.trunk["v"], [[0.5, 1.5], [1.5, 1.0]])
    # With other weights than equal ones nothing is a model again, nor a merge.
    close(merge.partial(net, [a, b], found, weights=(1, 0)).trunk["w"], [[2.0, 0.0], [4.0, 0.0]])


def test_a_residual_stream_crosses_both_cuts():
    net, trees, x, found = zip_of("residual")
    model = merge.partial(net, trees, found, span=slice(2, 4))
    assert len(model.crossing(x).values) == 2  # the second layer's values, and the stream
    groups = [g for _, g in net.crossing(2)]
    assert set().union(*groups) <= set(model.merge[0]) and len(groups) == 2
    given = renorm_ones(net, model)
    out = given(x)
    for k, tree in enumerate(trees):
        crossing, _ = given.run_trunk(x)
        back = net.map_crossing(tree, crossing, {g: u for g, (_, u) in found.maps[k].items()})
        close(out[k], net.run(found.in_units(net, tree), back, start=4))


def renorm_ones(net, model):
    """A model with ones for the variances that it lacks."""
    lacking = {n.var: jnp.ones(n.input_shape[-1]) for n in net.norms}
    have = dict(zip(net.paths, [None] * len(net.paths), strict=True))
    have |= flatten_named(model.trunk)[0]
    kept = net.trunk_leaves(model.cut, model.end)
    leaves = {p: lacking[p] for p in lacking if have[p] is None and p in kept}
    return dataclasses.replace(model, trunk=with_leaves(model.trunk, leaves))


def test_maps_of_heads_and_of_their_dimensions_at_once():
    net, trees, x = case("attention")
    labels = random_labels(net, 2) | {"q:heads": np.array([0, 0, 1, 1])}
    found = Maps.of_labels(labels, 2)
    assert {"q:heads", "q:dims", "u:dims"} <= found.mixed
    model = merge.partial(net, trees, found, span=slice(1, 2))
    (heads, _), (dims, _) = found.maps[0]["q:heads"], found.maps[0]["q:dims"]
    q = net.run(trees[0], x, capture=["q"])[1]["q"]
    mapped = net.map_site(trees[0], x, "q", q, {"q:heads": heads, "q:dims": dims})
    close(mapped, np.einsum("gh,fe,bthe->btgf", heads, dims, q))
    assert all(np.isfinite(out).all() for out in model(x))


def test_rectangular_maps_of_two_groups_along_one_axis():
    keys = jax.random.split(jax.random.key(0), 3)
    value, heads, dims = map(jax.random.normal, keys, [(5, 6), (4, 2), (5, 3)])
    sides = {"h": Axis("", 1, "elementwise", 1, 3), "d": Axis("", 1, "elementwise", 2, 1)}
    places = [Place(group, place, None) for group, place in sides.items()]
    expected = np.einsum("gh,fd,bhd->bgf", heads, dims, value.reshape(5, 2, 3)).reshape(5, 20)
    for order in (places, places[::-1]):
        close(mapped_value(value, order, {"h": heads, "d": dims}), expected)


# ---------------------------------------------------------------- other widths, other class counts


def test_plain_functions_take_models_with_classes_of_their_own():
    net, trees, x = case("mlp")
    trees[1] = draw("mlp", 1, classes=7)
    found = Maps.of_labels(random_labels(net, 2), 2)
    for merged in (slice(None, 2), slice(1, 3), slice(None, 0)):
        model = merge.partial(net, trees, found, span=merged)
        one, two = jax.jit(model)(x)
        assert one.shape == (5, 3) and two.shape == (5, 7)
    close(one, net.run(trees[0], x))
    assert model.params == sum(np.size(leaf) for leaf in jax.tree.leaves(trees))
    with pytest.raises(ValueError, match=r"trees\[1\] has shape \(7,\) at 'b4'"):
        merge.partial(net, trees, span=slice(1, None))


class Classifier(nn.Module):
    classes: int
    width: int = 6

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="a")(x))
        x = nn.relu(nn.Dense(self.width, name="b")(x))
        return nn.Dense(self.classes, name="c")(x)


def modules(*models):
    x = np.float32(np.random.default_rng(5).normal(size=(4, 3)))
    with jax.numpy_rank_promotion("allow"):
        trees = [initial(m, x, seed=k) for k, m in enumerate(models)]
        nets = [vfjax.trace(m.apply, t, x) for m, t in zip(models, trees, strict=True)]
    return nets, trees, x


def test_modules_with_classes_of_their_own_have_networks_of_their_own():
    nets, trees, x = modules(Classifier(3), Classifier(5))
    with pytest.raises(ValueError, match="need a network each"):
        merge.partial(nets[0], trees, span=slice(None, 2))
    with jax.numpy_rank_promotion("allow"):
        model = merge.partial(nets, trees, span=slice(None, 0))
        for out, net, tree in zip(model(x), nets, trees, strict=True):
            close(out, net.run(tree, x))
        model = merge.partial(nets, trees, span=slice(1, 2))
        assert [out.shape for out in jax.jit(lambda m, x: m(x))(model, x)] == [(4, 3), (4, 5)]
        assert model.nets == tuple(nets) and model.net is nets[0]
        # Two stems of 3*6+6, one layer of 6*6+6, heads of 6*3+3 and 6*5+5.
        assert model.params == 2 * 24 + 42 + 21 + 35
        assert model.flops == 2 * nets[0].stem_flops(1) + nets[0].trunk_flops(1, 2) + sum(
            net.trunk_flops(2) for net in nets
        )
        # At another batch size, which the second network was not run on.
        wide = jnp.concatenate([x, x])
        close(model(wide)[1][:4], model(x)[1])
    with pytest.raises(ValueError, match=r"trees\[1\], mapped, has shape"):
        merge.partial(nets, trees)


def test_widths_may_differ_where_maps_are_rectangular():
    nets, trees, x = modules(Classifier(3, width=6), Classifier(3, width=8))
    # The second model's features 6 and 7 are merged into its first two.
    label = np.array([0, 1, 2, 3, 4, 5, 0, 1])
    member = np.eye(6, dtype=np.float32)[label]
    merging = (member / member.sum(0)).T
    found = Maps(({}, {g: (merging, member) for g in nets[0].spec.groups}))
    with jax.numpy_rank_promotion("allow"):
        whole = merge.partial(nets, trees, found)
        assert jax.tree.map(jnp.shape, whole.trunk) == jax.tree.map(jnp.shape, trees[0])
        model = merge.partial(nets, trees, found, span=slice(1, 2))
        one, two = model(x)
        (z,) = model.run_trunk(x)[0].values
        assert z.shape == (4, 6)
        head = trees[1]["params"]["c"]
        close(two, jax.nn.relu(z)[:, label] @ head["kernel"] + head["bias"])
        first = [n.run(t, x, stop=1).values[0] for n, t in zip(nets, trees, strict=True)]
        close(model.crossing(x).values[0], (first[0] + first[1] @ merging.T) / 2)
        assert model.stems[1]["params"]["a"]["kernel"].shape == (3, 8)
    eye = {g: (np.eye(8), np.eye(8)) for g in nets[0].spec.groups}
    with pytest.raises(ValueError, match="different numbers of features"):
        merge.partial(nets, trees, Maps(({}, eye)))


# ----------------------------------------------------------------------------- as a pytree, counted


def test_a_model_is_a_pytree_that_compiles_once():
    net, trees, x, found = zip_of("mlp")
    model = merge.partial(net, trees, found, span=slice(1, 3))
    calls = []

    @jax.jit
    def run(model, x):
        calls.append(1)
        return model(x)

    for out, again in zip(model(x), run(model, x), strict=True):
        close(again, out)
    other = merge.partial(net, [draw("mlp", 7), trees[0]], found, span=slice(1, 3))
    run(other, 2 * x)
    assert len(calls) == 1
    out = jax.vmap(model)(jnp.stack([x, 2 * x]))
    for found, one, two in zip(out, model(x), model(2 * x), strict=True):
        close(found, jnp.stack([one, two]))


def test_gradients_reach_stems_trunk_and_heads():
    net, trees, x, found = zip_of("mlp")
    model = merge.partial(net, trees, found, span=slice(1, 3))

    def loss(model):
        return sum(jnp.square(out).sum() for out in model(x))

    grads = jax.grad(loss)(model)
    for part in (
        grads.stems[0]["w1"],
        grads.stems[1]["b1"],
        grads.trunk["w2"],
        grads.heads[1]["w4"],
    ):
        assert np.abs(part).max() > 0
    step = 1e-3
    moved = jax.tree.map(lambda a, g: a - step * g, model, grads)
    expected = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads))
    assert float(loss(model) - loss(moved)) == pytest.approx(step * expected, rel=0.05)


def test_batches_may_be_sharded():
    net, trees, x, found = zip_of("mlp")
    model = merge.partial(net, trees, found, span=slice(1, 3))
    x = jnp.concatenate([x, x, x, x])
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    for out, expected in zip(jax.jit(model)(jax.device_put(x, sharding)), model(x), strict=True):
        close(out, expected)


@pytest.mark.parametrize("name", ["mlp", "chain"])
def test_models_are_saved_and_loaded(tmp_path, name):
    net, trees, x, found = zip_of(name)
    for merged in (slice(None, 1), slice(1, 2), slice(2, None), slice(None, 0)):
        model = merge.partial(net, trees, found, span=merged)
        back = checkpoint.load(checkpoint.save(tmp_path / str(merged.stop), model), net=net)
        assert repr(back) == repr(model)
        same(back, model)
    nets, trees, x = modules(Classifier(3), Classifier(5))
    model = merge.partial(nets, trees, span=slice(1, 2))
    path = checkpoint.save(tmp_path / "nets", model)
    with jax.numpy_rank_promotion("allow"):
        for one, two in zip(checkpoint.load(path, net=nets)(x), model(x), strict=True):
            close(one, two)
    with pytest.raises(ValueError, match=r"net\[1\] is not the network"):
        checkpoint.load(path, net=nets[0])


def test_every_stem_trunk_and_head_counts_once():
    net, trees, _, found = zip_of("mlp", 3)  # 4, 6, 7, 5, 3 units
    for maps, extra in ((None, (0, 0)), (found, (3 * 36, 3 * 36))):
        model = merge.partial(net, trees, maps, span=slice(1, 3))
        assert model.params == 3 * 30 + (49 + 40) + 3 * 18 + extra[0]
        # Activations count one an element: those of the stem's end are the trunk's.
        flops = 3 * 24 + (6 + 42 + 7 + 35) + 3 * (5 + 15) + extra[1]
        assert model.flops == flops
    # Unmerge matrices select: each feature reads one that was merged.
    heads = merge.partial(net, trees, found, span=slice(None, 3))
    assert heads.params == 30 + 89 + 3 * 18
    assert "heads after 3" in repr(heads) and "mapped=['w3']" in repr(heads)


# ------------------------------------------------------------------------------------- named sites


def test_sites_of_stems_trunk_and_heads():
    net, trees, x, found = zip_of("mlp")
    model = merge.partial(net, trees, found, span=slice(1, 2))
    assert [model.apart(s) for s in ("input", "w1", "w2", "w3", "w4", "output")] == [
        True,
        False,
        False,
        True,
        True,
        True,
    ]
    out, values = model.read(x, ["output", "w1", "w3", "input", "w2"])
    assert list(values) == ["output", "w1", "w3", "input", "w2"]
    assert [len(values[s]) for s in values] == [2, 1, 2, 2, 1]
    for one, two in zip(values["output"], out, strict=True):
        np.testing.assert_array_equal(one, two)
    # An edit in the heads acts in all of them; one in the trunk on what both read.
    zero, found = model.run(x, capture=["w3"], edit={"w3": jnp.zeros_like})
    for z, value, tree in zip(zero, found["w3"], trees, strict=True):
        assert not value.any()
        close(z, jnp.broadcast_to(tree["b4"], z.shape))
    none, found = model.run(x, capture=["w2"], edit={"w2": jnp.zeros_like})
    for z, tree, u in zip(none, trees, model.unmerge, strict=True):
        close(
            z,
            net.run(
                tree,
                net.map_crossing(
                    tree, vfjax.Crossing((found["w2"],), 2, model.crossing(x).origin), u
                ),
                start=2,
            ),
        )
    with pytest.raises(ValueError, match="lies in the stem"):
        model.run(x, capture=["input"])
    with pytest.raises(ValueError, match="no site 'nope'"):
        model.run(x, capture=["nope"])
    with pytest.raises(TypeError, match="capture must be a sequence"):
        model.run(x, capture="w3")


def test_runs_between_two_cuts_make_up_the_whole():
    net, (tree, _), x = case("residual")
    expected = net.run(tree, x)
    for start, stop in itertools.combinations_with_replacement(range(net.depth + 1), 2):
        crossing = net.run(tree, net.run(tree, x, stop=start), start=start, stop=stop)
        close(net.run(tree, crossing, start=stop), expected)
        leaves = net.stem_leaves(start) | net.trunk_leaves(start, stop) | net.trunk_leaves(stop)
        assert leaves == set(net.paths)
        parts = net.stem_flops(start) + net.trunk_flops(start, stop) + net.trunk_flops(stop)
        assert parts == net.flops


# ------------------------------------------------------------------------------- unknown variances


def test_unknown_variances_are_reported_wherever_they_are_read():
    net, trees, x, found = zip_of("chain")
    tree = merge.interpolate(found.apply(net, trees))
    assert [n["var"] for n in (tree["n1"], tree["n2"], tree["n3"])] == [None] * 3
    assert tree["n1"]["mean"] is not None
    message = r"\['n1/var'.*unknown.*vfjax\.renorm\.reset\(net, merged, data\)"
    model = merge.as_merged(net, tree)
    for run in (net.run, jax.jit(net.run)):
        with pytest.raises(ValueError, match=message):
            run(tree, x)
    for run in (model, jax.jit(model)):
        with pytest.raises(ValueError, match=message):
            run(x)
    with pytest.raises(ValueError, match=message):
        vfjax.diagnose.features(net, tree, [x])
    with pytest.raises(ValueError, match=message):
        vfjax.diagnose.features(net, model, [x])
    # The norm after the cut is the trunk's, that after the last merged layer the heads' own.
    first = merge.partial(net, trees, found, span=slice(2, 3))
    with pytest.raises(ValueError, match=r"\['n2/var'\]"):
        first(x)
    assert first.heads[0]["n3"]["var"] is not None


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"span": 2}, TypeError, "span must be a slice of the layers"),
        ({"span": slice(0.5, None)}, TypeError, "whole numbers"),
        ({"span": slice(True, None)}, TypeError, "whole numbers"),
        ({"span": slice(None, None, 2)}, ValueError, "without a step"),
        ({"span": slice(3, 1)}, ValueError, "begins after 3 and ends after 1"),
        ({"maps": [{}, {}]}, TypeError, "of_permutations"),
        ({"maps": Maps(({}, {}, {}))}, ValueError, "the 3 models matched, got 2"),
        ({"maps": Maps(({}, {"nope": (np.eye(2), np.eye(2))}))}, ValueError, "'nope'"),
        ({"maps": Maps(({}, {"w1": (np.eye(2), np.eye(2))}))}, ValueError, r"M \[m, 6\]"),
        (
            {"maps": Maps(({}, {"w1": (np.full((6, 6), np.nan), np.eye(6))}))},
            ValueError,
            r"maps\['w1'\] of model 1 hold 36 NaN or infinite entries",
        ),
        ({"weights": (1.0,)}, ValueError, "weights has 1 entries for 2"),
        ({"weights": (0.5, 0.5), "alpha": 0.5}, ValueError, "either weights or alpha"),
    ],
)
def test_arguments_are_checked(options, error, message):
    net, trees, _ = case("mlp")
    with pytest.raises(error, match=message):
        merge.partial(net, trees, **options)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (
            [0, 2, 0, 2],
            ValueError,
            r"labels\['w1'\] must be 0 to 2 without a gap, but 1",
        ),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], ValueError, "0 to 1 without a gap, but 1 is missing"),
        ([0, -1, 0, 1], ValueError, r"labels\['w1'\] must be 0 or more; it holds -1"),
        ([0, 1, 0], ValueError, r"must be of shape \(2 \* n,\) or .* it has \(3,\)"),
        ([], TypeError, "must hold integers; it holds float64"),
        ([0.0, 1.0, 0.0, 1.0], TypeError, "must hold integers; it holds float64"),
    ],
)
def test_labels_are_checked(labels, error, message):
    with pytest.raises(error, match=message):
        Maps.of_labels({"w1": np.array(labels)}, 2)
    with pytest.raises(TypeError, match="models must be a whole number of 1 or more, got 2.0"):
        Maps.of_labels({"w1": np.array([0, 1, 0, 1])}, 2.0)


def test_models_and_networks_are_checked():
    net, trees, _ = case("mlp")
    other, _, _ = case("chain")
    with pytest.raises(ValueError, match="trees must be at least two, got 1"):
        merge.partial(net, trees[:1])
    with pytest.raises(TypeError, match="trees must be a list or tuple"):
        merge.partial(net, trees[0])
    with pytest.raises(TypeError, match="net must be a Network or a sequence of one per model"):
        merge.partial(mlp, trees)
    with pytest.raises(ValueError, match="net has 1 networks for 2 trees"):
        merge.partial([net], trees)
    with pytest.raises(ValueError, match=r"net\[1\] has other layers"):
        merge.partial([net, other], trees)
    with pytest.raises(ValueError, match=r"trees\[1\] holds 1 NaN"):
        bad = {**trees[1], "b4": trees[1]["b4"].at[0].set(jnp.nan)}
        merge.partial(net, [trees[0], bad], span=slice(None, 2))


def test_integers_that_would_be_mixed_are_an_error():
    def gated(v, x):
        z = x @ v["w"]
        z = jnp.where(mask := z > 0, z, 0) @ v["u"]
        return jnp.where(mask, z, 0) @ v["v"]

    tree = {"w": jnp.ones((3, 4)), "u": jnp.ones((4, 4)), "v": jnp.ones((4, 2))}
    net = vfjax.trace(gated, tree, jnp.ones((2, 3)))
    maps = {"w": (np.full((4, 4), 0.25, np.float32),) * 2}
    assert {str(aval.dtype) for aval, groups in net.crossing(2) if groups} == {"bool", "float32"}
    with pytest.raises(ValueError, match="dtype bool crosses the cut at depth 2.*cannot be mixed"):
        merge.partial(net, [tree, tree], Maps((maps, maps)), span=slice(None, 2))
