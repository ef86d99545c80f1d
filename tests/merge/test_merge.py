"""Merging: averages and soups, and the laws of Preserve-First Merging."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from helpers import along, assert_close, conv, norm, of_shapes, traced
from vfjax import checkpoint, merge

# Two float32 evaluations of one function in different order agree to this, relative to their size.
ROUNDING = 2e-5


def close(actual, expected, tol=ROUNDING):
    assert jnp.asarray(actual).dtype == jnp.asarray(expected).dtype
    assert_close(actual, expected, tol)


def trees_close(actual, expected, tol=ROUNDING):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(close, tol=tol), actual, expected)


# ------------------------------------------------------------------------------------- networks


def mlp(v, x):
    for i in (1, 2, 3):
        x = jax.nn.relu(x @ v[f"w{i}"] + along(v[f"b{i}"], x[:, :1] @ v[f"w{i}"][:1]))
    return jax.nn.log_softmax(x @ v["w4"])


def convnet(v, x):
    x = conv(x, v["w1"])
    x = jax.nn.relu(x + along(v["b1"], x))
    x = conv(x, v["w2"])
    x = jax.nn.relu(x + along(v["b2"], x))
    x = x.mean((1, 2)) @ v["w3"]
    return x + along(v["b3"], x)


def resnet(v, x):
    """Stem; a block with an identity skip; a block with a strided shortcut convolution; head."""
    x = jax.nn.relu(norm(v["n0"], conv(x, v["stem"])))
    for block, stride in (("a", 1), ("b", 2)):
        p = v[block]
        y = jax.nn.relu(norm(p["n1"], conv(x, p["w1"], stride)))
        y = norm(p["n2"], conv(y, p["w2"]))
        if "short" in p:
            x = norm(p["n3"], conv(x, p["short"], stride))
        x = jax.nn.relu(x + y)
    x = x.mean((1, 2)) @ v["head"]
    return x + along(v["bias"], x)


def bn(n):
    return {"mean": (n,), "var": (n,), "scale": (n,), "bias": (n,)}


# Few distinct shapes: run eagerly, each costs a compilation per operation.
SHAPES = {
    "mlp": {
        **{"w1": (5, 6), "w2": (6, 6), "w3": (6, 6), "w4": (6, 3)},
        **{"b1": (6,), "b2": (6,), "b3": (6,)},
    },
    "convnet": {
        **{"w1": (3, 3, 2, 4), "w2": (3, 3, 4, 4), "w3": (4, 3)},
        **{"b1": (4,), "b2": (4,), "b3": (3,)},
    },
    "resnet": {
        "stem": (3, 3, 2, 4),
        "n0": bn(4),
        "a": {"w1": (3, 3, 4, 4), "w2": (3, 3, 4, 4), "n1": bn(4), "n2": bn(4)},
        "b": {
            **{"w1": (3, 3, 4, 4), "w2": (3, 3, 4, 4), "short": (1, 1, 4, 4)},
            **{"n1": bn(4), "n2": bn(4), "n3": bn(4)},
        },
        "head": (4, 3),
        "bias": (3,),
    },
}
FUNCTIONS = {"mlp": mlp, "convnet": convnet, "resnet": resnet}


@functools.cache
def network(name):
    trees = [of_shapes(SHAPES[name], k) for k in range(3)]
    shape = (8, 5) if name == "mlp" else (8, 4, 4, 2)
    x = jnp.asarray(np.random.default_rng(9).normal(size=shape), jnp.float32)
    return traced(FUNCTIONS[name], SHAPES[name], shape), trees, x


every_network = pytest.mark.parametrize("name", list(SHAPES))


# -------------------------------------------------------------------------------------- averages


def test_interpolate_is_the_weighted_mean_of_any_number_of_trees():
    _, trees, _ = network("convnet")
    weights = (0.2, 0.3, 0.5)
    expected = jax.tree.map(lambda *v: sum(w * x for w, x in zip(weights, v, strict=True)), *trees)
    trees_close(merge.interpolate(trees, weights), expected)
    trees_close(merge.uniform_soup(trees), jax.tree.map(lambda *v: sum(v) / 3, *trees))


@pytest.mark.parametrize("alpha", [0, 1])
def test_ends_of_an_interpolation_are_the_edges_to_the_bit(alpha):
    tree = {"a": jnp.array([-0.0, 1e-30, 3.0]), "b": jnp.array([0.1], jnp.bfloat16)}
    other = jax.tree.map(lambda v: v + 7, tree)
    ends = (tree, other)
    got = merge.interpolate(ends, alpha=alpha)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(ends[alpha]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_low_precision_is_averaged_in_float32_and_cast_back():
    one = jnp.full(3, 256, jnp.bfloat16)
    # In bfloat16 257 rounds to 256, and so would every partial sum.
    trees = [{"w": one}] + [{"w": one * 0 + jnp.bfloat16(2.0)}] * 2
    got = merge.interpolate(trees)["w"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, jnp.full(3, 260 / 3, jnp.bfloat16))


def test_float64_leaves_are_averaged_in_float64(x64):
    a, b = {"w": jnp.array([1.0 + 1e-12])}, {"w": jnp.array([1.0])}
    assert float(merge.interpolate([a, b])["w"][0]) == 1.0 + 0.5e-12


def test_integer_leaves_must_agree_and_are_passed_on():
    a, b = {"w": jnp.ones(2), "step": jnp.array(3)}, {"w": jnp.ones(2), "step": jnp.array(4)}
    assert int(merge.interpolate([a, a])["step"]) == 3
    with pytest.raises(ValueError, match="'step' is of dtype int32"):
        merge.interpolate([a, b])
    keys = [{"k": jax.random.key(i)} for i in (0, 1)]
    assert merge.interpolate([keys[0], keys[0]])["k"] == keys[0]["k"]
    with pytest.raises(ValueError, match="'k'"):
        merge.interpolate(keys)


def test_interpolation_goes_through_jit_and_vmap_over_weights():
    _, (a, b, _), _ = network("mlp")
    alphas = jnp.linspace(0, 1, 5)
    many = jax.jit(jax.vmap(lambda t: merge.interpolate([a, b], alpha=t)))(alphas)
    trees_close(jax.tree.map(lambda v: v[1], many), merge.interpolate([a, b], alpha=0.25))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"weights": (0.5, 0.6)}, ValueError, "weights must sum to one"),
        ({"weights": (1.0,)}, ValueError, "weights has 1 entries for 2"),
        ({"weights": (float("nan"), 1.0)}, ValueError, "weights must be finite"),
        ({"weights": 0.5}, TypeError, "weights must be a sequence"),
        ({"weights": (0.5, 0.5), "alpha": 0.5}, ValueError, "either weights or alpha"),
    ],
)
def test_bad_weights(kwargs, error, message):
    tree = {"w": jnp.ones(2)}
    with pytest.raises(error, match=message):
        merge.interpolate([tree, tree], **kwargs)


def test_alpha_is_for_two():
    with pytest.raises(ValueError, match="alpha is for two trees, got 3"):
        merge.interpolate([{"w": jnp.ones(2)}] * 3, alpha=0.5)


@pytest.mark.parametrize(
    ("trees", "error", "message"),
    [
        ({"w": jnp.ones(2)}, TypeError, "trees must be a list or tuple"),
        ([], ValueError, "trees is empty"),
        ([{"w": jnp.ones(2)}, {"v": jnp.ones(2)}], ValueError, "differs in structure"),
        ([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}], ValueError, r"shape \(3,\) at 'w'"),
        ([{"w": jnp.ones(2)}, {"w": jnp.ones(2, "int32")}], ValueError, "dtype int32 at 'w'"),
        ([{"w": jnp.ones(2)}, {"w": jnp.array([1.0, jnp.nan])}], ValueError, "NaN or infinite"),
        ([{"w": jnp.ones(2), "f": jnp.tanh}] * 2, TypeError, "eqx.partition"),
    ],
)
def test_bad_trees(trees, error, message):
    with pytest.raises(error, match=message):
        merge.interpolate(trees)


def test_greedy_soup_keeps_what_helps_and_never_does_worse_than_the_best():
    values = [3.0, -2.5, 9.0, 1.0]
    trees = [{"w": jnp.array(v)} for v in values]
    calls = []

    def score(tree):
        calls.append(float(tree["w"]))
        return -abs(float(tree["w"]))

    soup = merge.greedy_soup(trees, score)
    # The best alone is 1.0; with -2.5 it becomes -0.75, with 3.0 it becomes 0.5; 9.0 spoils it.
    assert soup.kept == (3, 1, 0)
    assert soup.score == -0.5 and float(soup.tree["w"]) == 0.5
    assert len(calls) <= 2 * len(trees) - 1
    with pytest.raises(ValueError, match="NaN"):
        merge.greedy_soup(trees, lambda tree: float("nan"))


# ------------------------------------------------------------------------------ preserve_first


@every_network
@pytest.mark.parametrize("count", [2, 3])
def test_limits_are_the_merged_model_and_the_ensemble(name, count):
    net, trees, x = network(name)
    trees = trees[:count]
    weights = (0.3, 0.7) if count == 2 else (0.2, 0.5, 0.3)
    merged = merge.preserve_first(net, trees, layers=0, weights=weights)
    assert merged.stems == () and merged.corrections == {}
    tree = merge.interpolate(trees, weights)
    trees_close(merged.trunk, tree, tol=0)
    close(merged(x), net.run(tree, x))

    whole = merge.preserve_first(net, trees, layers=net.depth, weights=weights)
    logits = []
    head = net.layers[-1].name
    for tree in trees:
        logits.append(net.run(tree, x, capture=[head])[1][head])
    mean = sum(w * z for w, z in zip(weights, logits, strict=True))
    # What follows the logits (log-softmax, in the MLP) acts on their mean.
    expected = jax.nn.log_softmax(mean) if name == "mlp" else mean
    close(whole(x), expected)
    close(merge.ensemble(net, trees, weights)(x), expected)


@pytest.mark.parametrize("name", ["mlp", "convnet"])
def test_in_a_chain_one_layer_equals_none(name):
    net, trees, x = network(name)
    none, one = (merge.preserve_first(net, trees, layers=k) for k in (0, 1))
    close(one(x), none(x))
    two = merge.preserve_first(net, trees, layers=2)
    assert float(jnp.abs(two(x) - none(x)).max()) > 1e-2


@every_network
def test_merging_a_model_with_itself_is_the_identity_at_every_depth(name):
    net, (tree, *_), x = network(name)
    for layers in range(net.depth + 1):
        model = merge.preserve_first(net, [tree] * 3, layers=layers, weights=(0.2, 0.3, 0.5))
        close(model(x), net.run(tree, x))


@every_network
@pytest.mark.parametrize("alpha", [0, 1])
def test_ends_of_the_interval_are_the_edges_at_every_depth(name, alpha):
    net, trees, x = network(name)
    expected = net.run(trees[alpha], x)
    for layers in range(net.depth + 1):
        model = merge.preserve_first(net, trees[:2], layers=layers, weights=(1 - alpha, alpha))
        np.testing.assert_allclose(model(x), expected, rtol=1e-6, atol=1e-6)


@every_network
def test_a_cut_model_averages_crossings_of_the_whole_stems(name):
    """Against the definition, spelled out with the network's own cut."""
    net, trees, x = network(name)
    weights = (0.2, 0.3, 0.5)
    tree = merge.interpolate(trees, weights)
    for layers in range(1, net.depth + 1):
        crossings = [net.run(t, x, stop=layers) for t in trees]
        expected = net.run(tree, net.average_crossings(crossings, weights), start=layers)
        close(merge.preserve_first(net, trees, layers=layers, weights=weights)(x), expected)


@every_network
def test_sides_hold_only_what_they_read(name):
    net, trees, _ = network(name)
    paths = dict(zip(net.paths, jax.tree.leaves(trees[0]), strict=True))
    for layers in range(1, net.depth + 1):
        model = merge.preserve_first(net, trees, layers=layers)
        held = sum(v.size for v in jax.tree.leaves(model.stems[0]))
        assert held == sum(paths[p].size for p in net.stem_leaves(layers))
        held = sum(v.size for v in jax.tree.leaves(model.trunk))
        assert held == sum(paths[p].size for p in net.trunk_leaves(layers))


@every_network
@pytest.mark.parametrize("count", [2, 3])
def test_cost_is_that_of_all_stems_and_one_trunk(name, count):
    net, trees, _ = network(name)
    for layers in range(net.depth + 1):
        model = merge.preserve_first(net, trees[:count], layers=layers)
        stems = count * net.stem_params(layers) if layers else 0
        assert model.params == model.params == stems + net.trunk_params(layers)
    assert merge.preserve_first(net, trees[:count], layers=0).params == net.params
    assert merge.preserve_first(net, trees[:count], layers=0).flops == net.flops
    costs = [merge.preserve_first(net, trees[:count], layers=k) for k in range(net.depth + 1)]
    assert [c.params for c in costs] == sorted(c.params for c in costs)
    assert [c.flops for c in costs] == sorted(c.flops for c in costs)


def test_cost_of_a_chain_by_hand():
    net, trees, _ = network("convnet")
    first = 3 * 3 * 2 * 4 + 4
    total = first + 3 * 3 * 4 * 4 + 4 + 4 * 3 + 3
    model = merge.preserve_first(net, trees, layers=1)
    assert model.params == total + 2 * first
    assert model.flops == net.flops + 2 * (16 * 3 * 3 * 2 * 4 + 16 * 4)


def test_running_statistics_are_no_parameters():
    net, trees, _ = network("resnet")
    statistics = {p: v for p, v in zip(net.paths, jax.tree.leaves(trees[0]), strict=True)}
    counted = sum(v.size for p, v in statistics.items() if p.split("/")[-1] not in ("mean", "var"))
    assert merge.preserve_first(net, trees, layers=0).params == counted
    whole = merge.ensemble(net, trees)
    assert whole.params == 3 * counted


# ------------------------------------------------------------------------------------ as a value


def test_a_model_is_a_callable_pytree():
    net, trees, x = network("resnet")
    model = merge.preserve_first(net, trees, layers=2)
    expected = model(x)
    close(jax.jit(model)(x), expected)
    close(jax.jit(lambda m, x: m(x))(model, x), expected)
    doubled = jax.tree.map(lambda v: v, model)
    assert doubled is not model and doubled != model and model == model
    close(doubled(x), expected)
    assert hash(model) != hash(doubled)
    leaves, treedef = jax.tree.flatten(model)
    close(jax.tree.unflatten(treedef, leaves)(x), expected)
    grads = jax.grad(lambda m: jnp.square(m(x)).sum())(model)
    assert jax.tree.structure(grads) == jax.tree.structure(model)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    with pytest.raises(AttributeError):
        model.cut = 3
    assert "cut=2" in repr(model)


def test_a_second_model_of_one_cut_compiles_nothing():
    net, trees, x = network("convnet")
    count = []

    @jax.jit
    def evaluate(model, x):
        count.append(None)
        return model(x)

    for chosen in (trees[:2], trees[1:]):
        evaluate(merge.preserve_first(net, chosen, layers=2), x)
    evaluate(merge.preserve_first(net, trees[:2], layers=2), x)
    assert len(count) == 1


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_crossings_can_be_stored(name):
    net, trees, x = network(name)
    for layers in range(1, net.depth + 1):
        model = merge.preserve_first(net, trees, layers=layers)
        close(model.run(jax.jit(model.crossing)(x)), model(x))
    with pytest.raises(ValueError, match="no crossing"):
        merge.preserve_first(net, trees, layers=0).crossing(x)


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_corrections_act_on_the_averaged_pre_activation(name):
    net, trees, x = network(name)
    for layers in range(net.depth + 1):
        model = merge.preserve_first(net, trees, layers=layers)
        for layer in net.layers:
            if not layer.main or layer.depth < layers:
                continue
            scale = jnp.linspace(0.5, 2, layer.channels)
            shift = jnp.linspace(-1, 1, layer.channels)
            corrected = jax.tree.map(lambda v: v, model)
            object.__setattr__(corrected, "corrections", {layer.name: (scale, shift)})
            edit = {layer.name: lambda z, a=scale, b=shift: z * along(a, z) + along(b, z)}
            close(corrected(x), model.run(x, edit=edit))
            # An edit of the caller's comes after the correction.
            out, seen = corrected.run(
                x, capture=[layer.name], edit={layer.name: lambda z: z * 0 + 1}
            )
            assert bool((seen[layer.name] == 1).all())


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_models_are_saved_and_loaded(name, tmp_path):
    net, trees, x = network(name)
    for layers in (0, 2, net.depth):
        model = merge.preserve_first(net, trees, layers=layers, weights=(0.2, 0.3, 0.5))
        last = net.layers[-1]
        pair = (jnp.full(last.channels, 2.0), jnp.arange(float(last.channels)))
        object.__setattr__(model, "corrections", {last.name: pair})
        checkpoint.save(tmp_path / "model", model)
        loaded = checkpoint.load(tmp_path / "model", net=net)
        assert isinstance(loaded, merge.Merged)
        assert (loaded.cut, loaded.weights) == (model.cut, model.weights)
        trees_close(loaded, model, tol=0)
        np.testing.assert_array_equal(loaded(x), model(x))
    other, _, _ = network("mlp" if name != "mlp" else "convnet")
    with pytest.raises(ValueError, match="net is not the network of this checkpoint"):
        checkpoint.load(tmp_path / "model", net=other)
    with pytest.raises(ValueError, match="net"):
        checkpoint.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (-1, ValueError, "layers was -1; this network has 3 layers"),
        (4, ValueError, "layers was 4.*give 0 to 3"),
        (1.0, TypeError, "layers must be a whole number"),
        (True, TypeError, "layers must be a whole number"),
        ("all", TypeError, "layers must be a whole number"),
    ],
)
def test_bad_layer_counts(layers, error, message):
    net, trees, _ = network("convnet")
    with pytest.raises(error, match=message):
        merge.preserve_first(net, trees, layers=layers)


def test_trees_must_fit_the_network():
    net, trees, _ = network("convnet")
    with pytest.raises(ValueError, match="at least two"):
        merge.preserve_first(net, trees[:1], layers=1)
    _, others, _ = network("mlp")
    with pytest.raises(ValueError, match="differs in structure"):
        merge.preserve_first(net, others, layers=1)
    with pytest.raises(ValueError, match="sum to one"):
        merge.preserve_first(net, trees, layers=1, weights=(1, 1, 1))
    with pytest.raises(ValueError, match="differs in structure"):
        merge.as_merged(net, others[0])


@pytest.mark.parametrize(
    "call",
    [
        lambda net, trees: merge.preserve_first(net, trees, layers=1),
        lambda net, trees: merge.ensemble(net, trees),
        lambda net, trees: merge.as_merged(net, trees[0]),
        lambda net, trees: vfjax.renorm.reset(net, trees[0], []),
        lambda net, trees: vfjax.renorm.repair(net, trees[0], [], references=trees),
        lambda net, trees: vfjax.renorm.rescale(net, trees[0], [], references=trees),
        lambda net, trees: vfjax.renorm.remove_bias(net, trees[0], last="all"),
        lambda net, trees: vfjax.renorm.calibrate_bias(
            net, merge.as_merged(network("convnet")[0], trees[0])
        ),
    ],
)
def test_the_function_itself_is_no_network(call):
    _, trees, _ = network("convnet")
    message = r"net must be a Network; it was a function.*vfjax\.trace\(apply_fn, variables, x\)"
    with pytest.raises(TypeError, match=message):
        call(convnet, trees)


def test_weights_of_a_wrapped_tree_are_a_sequence():
    net, (tree, *_), _ = network("convnet")
    assert merge.as_merged(net, tree, weights=(0.2, 0.3, 0.5)).weights == (0.2, 0.3, 0.5)
    with pytest.raises(TypeError, match="weights must be a sequence of numbers"):
        merge.as_merged(net, tree, weights=0.5)
    with pytest.raises(TypeError, match="weights must be a sequence of numbers"):
        vfjax.renorm.calibrate_bias(net, tree, weights=0.5)


@pytest.mark.parametrize("cut", [0, 2])
def test_bad_arguments_of_a_run(cut):
    net, trees, x = network("convnet")
    model = merge.preserve_first(net, trees, layers=cut)
    with pytest.raises(TypeError, match="edit must map site names"):
        model.run(x, edit=["w2"])
    with pytest.raises(ValueError, match="no site 'w9'"):
        model.run(x, capture=["w9"])
    if cut:
        with pytest.raises(ValueError, match="Site 'w1' lies in the stem"):
            model.run(x, capture=["w1"])


# -------------------------------------------------------------------------------------- warnings


def trace_quietly(fn, tree, x):
    net = vfjax.trace(fn, tree, x)
    return net, [tree, jax.tree.map(lambda v: v * 2, tree)]


def test_a_fixed_layer_is_warned_of_once_unless_it_is_kept_or_the_last():
    def reversing(v, x):
        x = jax.nn.relu(x @ v["w1"])
        x = jax.nn.relu(jax.lax.cumsum(x, axis=1) @ v["w2"])
        return x @ v["w3"]

    tree = {"w1": jnp.ones((3, 4)), "w2": jnp.ones((4, 4)), "w3": jnp.ones((4, 2))}
    net, trees = trace_quietly(reversing, tree, jnp.ones((5, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge.preserve_first(net, trees, layers=2)  # the layer is kept
        merge.ensemble(net, trees)
    with pytest.warns(UserWarning, match=r"layer 'w1'.*`cumsum` at test_merge.py:\d+"):
        merge.preserve_first(net, trees, layers=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge.preserve_first(net, trees, layers=0)


def test_channels_tied_to_the_input_or_output_are_no_cause_for_warning():
    def skip(v, x):
        x = x + x @ v["w1"]
        return x @ v["w2"]

    tree = {"w1": jnp.ones((3, 3)), "w2": jnp.ones((3, 2))}
    net, trees = trace_quietly(skip, tree, jnp.ones((5, 3)))
    merge.preserve_first(net, trees, layers=0)


@every_network
def test_ordinary_networks_give_no_warning(name):
    net, trees, _ = network(name)
    merge.preserve_first(net, trees, layers=0)  # warnings are errors here


# -------------------------------------------------------------------------------------- devices


def test_a_batch_may_be_sharded():
    net, trees, x = network("convnet")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    model = merge.preserve_first(net, trees, layers=2)
    expected = model(x)
    close(jax.jit(lambda m, x: m(x))(model, jax.device_put(x, sharding)), expected)


def scanned(steps):
    """A network whose layers, but for the last, hide in a scan that is too long to unroll."""
    v = {"k": jnp.ones((steps, 3, 3)) / 3, "b": jnp.ones((steps, 3)), "w": jnp.ones((3, 2))}

    def apply_fn(v, x):
        layer = lambda h, kb: (jax.nn.relu(h @ kb[0] + kb[1][None]), None)  # noqa: E731
        return jax.lax.scan(layer, x, (v["k"], v["b"]))[0] @ v["w"]

    return vfjax.trace(apply_fn, v, jnp.ones((2, 3))), v


def test_a_cut_inside_of_an_opaque_primitive():
    net, v = scanned(70)
    with pytest.raises(ValueError, match="inside the opaque scan at test_merge.py"):
        merge.preserve_first(net, [v, v], layers=5)


def test_biases_inside_of_an_opaque_primitive():
    net, v = scanned(70)
    with pytest.warns(UserWarning, match="inside the opaque scan at test_merge.py"):
        vfjax.renorm.remove_bias(net, v, last="all")


def test_sites_inside_of_an_opaque_primitive():
    net, v = scanned(70)
    with pytest.raises(ValueError, match="inside the opaque scan at test_merge.py"):
        vfjax.stats.moments(net, [v], [jnp.ones((2, 3))], sites=["k"])


def test_a_checkpoint_is_of_the_same_leaves(tmp_path):
    """Networks of equal layers may differ in what stands between these."""

    def plain(v, x):
        return jax.nn.relu(x @ v["w1"]) @ v["w2"]

    def scaled(v, x):
        return jax.nn.relu(x @ v["w1"] * jnp.broadcast_to(v["s"], (len(x), 4))) @ v["w2"]

    x = np.ones((2, 3), np.float32)
    tree = {"w1": np.ones((3, 4), np.float32), "w2": np.ones((4, 2), np.float32)}
    larger = tree | {"s": np.full(4, 2.0, np.float32)}
    less, more = vfjax.trace(plain, tree, x), vfjax.trace(scaled, larger, x)
    for layers in (0, 1, 2):
        small = merge.preserve_first(less, [tree, tree], layers=layers)
        large = merge.preserve_first(more, [larger, larger], layers=layers)
        with pytest.raises(ValueError, match=r"it lacks 's' of the (trunk|stem0)"):
            checkpoint.load(checkpoint.save(tmp_path / "large", large), less)
        with pytest.raises(ValueError, match=r"the (trunk|stem0) was saved without 's'"):
            checkpoint.load(checkpoint.save(tmp_path / "small", small), more)
        close(checkpoint.load(tmp_path / "large", more)(x), scaled(larger, x))
