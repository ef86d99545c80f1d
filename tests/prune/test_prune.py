"""Pruning: scores by their definitions, masks of exact sparsity, and what comes after."""

from __future__ import annotations

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import vfjax
from helpers import initial
from vfjax import diagnose, merge, models, prune, renorm, stats
from vfjax._trees import flatten_named

DIMS = ("NHWC", "HWIO", "NHWC")


def normal(seed, *shape):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def mlp(p, x):
    h = jax.nn.relu(x @ p["w0"] + p["b0"][None])
    return jax.nn.relu(h @ p["w1"] + p["b1"][None]) @ p["w2"]


def dense(seed=0, width=8):
    return {
        "w0": normal(seed, 5, width),
        "b0": normal(seed + 1, width),
        "w1": normal(seed + 2, width, width),
        "b1": normal(seed + 3, width),
        "w2": normal(seed + 4, width, 3),
    }


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(9)
    return [(normal(k, 12, 5), jnp.asarray(rng.integers(0, 3, 12))) for k in (20, 21)]


@pytest.fixture(scope="module")
def net(data):
    return vfjax.trace(mlp, dense(), data[0][0])


# ---------------------------------------------------------------------------------------- masks


@functools.cache
def one_layer(inputs):
    """A network of one output, so that all weights are in one row."""
    w, x = jnp.ones((inputs, 1)), jnp.ones((2, inputs))
    return vfjax.trace(lambda p, x: x @ p["w"], {"w": w}, x)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    share=st.floats(0, 1),
)
def test_the_lowest_go_and_of_equals_the_first(values, share):
    values = np.float32(values)
    net = one_layer(len(values))
    found = prune.masks(prune.magnitude(net, {"w": values[:, None]}), share)["w"][:, 0]
    expected = np.ones(len(values), bool)
    expected[np.argsort(values, kind="stable")[: int(share * len(values) + 0.5)]] = False
    assert (found == expected).all()


@pytest.mark.parametrize("scope", ["global", "layer", "row"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95, 0.999, 1.0])
def test_sparsity_is_exact(net, scope, share):
    tree = dense()
    # Nothing but ties.
    tree = jax.tree.map(jnp.ones_like, tree) if share == 0.5 else tree
    mask = prune.masks(prune.magnitude(net, tree), share, scope=scope)
    sizes = {
        "global": [[mask["w0"], mask["w1"], mask["w2"]]],
        "layer": [[mask[w]] for w in ("w0", "w1", "w2")],
        "row": [[column] for w in ("w0", "w1", "w2") for column in mask[w].T],
    }[scope]
    for parts in sizes:
        whole = np.concatenate([np.ravel(part) for part in parts])
        assert (~whole).sum() == int(np.floor(share * whole.size + 0.5))
    assert mask["b0"] is True and mask["b1"] is True
    pruned = prune.apply(tree, mask)
    kept = [np.abs(tree[w])[mask[w]].min(initial=np.inf) for w in ("w0", "w1", "w2")]
    gone = [np.abs(tree[w])[~mask[w]].max(initial=0) for w in ("w0", "w1", "w2")]
    if scope == "global":
        assert max(gone) <= min(kept)
    for path, leaf in pruned.items():
        expected = np.asarray(tree[path]) * np.broadcast_to(mask[path], leaf.shape)
        np.testing.assert_array_equal(leaf, expected)


def test_a_share_in_float32_is_as_exact():
    """Just below one half, nothing goes of a single weight; rounded to float32, the sum is 1."""
    share = np.nextafter(np.float32(0.5), np.float32(0))
    assert int(share + np.float32(0.5)) == 1
    scores = prune.magnitude(one_layer(1), {"w": np.ones((1, 1), np.float32)})
    assert prune.masks(scores, share)["w"].all()


def test_magnitudes_are_not_rounded():
    tree = {"w": np.array([[1 + 1e-12], [1.0], [1 - 1e-12]])}
    net = vfjax.trace(lambda p, x: x @ p["w"], tree, jnp.ones((1, 3)))
    mask = prune.masks(prune.magnitude(net, tree), 0.34)
    assert mask["w"].ravel().tolist() == [True, True, False]


def test_plain_numbers_may_be_parameters():
    tree = {"w": normal(0, 3, 2), "scale": 2.0}
    net = vfjax.trace(lambda p, x: p["scale"] * (x @ p["w"]), tree, jnp.ones((1, 3)))
    pruned = prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.5))
    assert pruned["scale"] == 2.0 and np.count_nonzero(pruned["w"]) == 3


def test_n_of_m(net):
    tree = dense()
    mask = prune.masks(prune.magnitude(net, tree, names=["w1", "w2"]), scope=(2, 4))
    for path in ("w1", "w2"):
        parts = mask[path].T.reshape(-1, 4)
        assert (parts.sum(1) == 2).all()
        values = np.abs(np.asarray(tree[path])).T.reshape(-1, 4)
        assert (np.where(parts, values, np.inf).min(1) >= np.where(parts, 0, values).max(1)).all()
    with pytest.raises(ValueError, match="'w0' has 5 inputs per output, which 4 does not divide"):
        prune.masks(prune.magnitude(net, tree), scope=(2, 4))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sparsity": 1.5}, "sparsity must be a share from 0 to 1 .*, got 1.5"),
        ({"sparsity": None}, "sparsity must be a share from 0 to 1 .*, got None"),
        ({"scope": "column"}, "scope must be one of global, layer, row, or .n, m."),
        ({"scope": (5, 4)}, "scope must be one of"),
        ({"scope": (2, 4)}, "sparsity follows from scope"),
    ],
)
def test_masks_say_what_is_wrong(net, changes, message):
    with pytest.raises(ValueError, match=message):
        prune.masks(prune.magnitude(net, dense()), **{"sparsity": 0.5} | changes)


def test_masks_must_fit_the_tree(net):
    mask = prune.masks(prune.magnitude(net, dense()), 0.5)
    with pytest.raises(ValueError, match="mask must have the structure of the tree"):
        prune.apply({"w0": dense()["w0"]}, mask)
    with pytest.raises(ValueError, match=r"mask has shape \(5, 8\) at 'w0'.* \(5, 4\)"):
        prune.apply(dense(width=4), mask)
    with pytest.raises(ValueError, match="updates has a leaf 'params/b0', which mask lacks"):
        prune.keep(mask).update({"params": dense()}, optax.EmptyState())


# --------------------------------------------------------------------------------------- layers


def test_layers_are_chosen():
    model = models.create("resnet20", width=0.25)
    x = jnp.zeros((2, 8, 8, 3))
    tree = initial(model, x)
    net = vfjax.trace(models.apply_fn(model), tree, x)
    every = prune.prunable(net)
    assert len(every) == 22
    without = prune.prunable(net, shortcuts=False)
    assert set(every) - set(without) == {name for name in every if "shortcut" in name}
    assert prune.prunable(net, first=False) == every[1:]
    assert prune.prunable(net, kinds=["dense"]) == (every[-1],)
    assert prune.prunable(net, last=False) == every[:-1]
    scores = prune.magnitude(net, tree, names=without)
    mask = prune.masks(scores, 0.9)
    pruned = prune.apply(tree, mask)
    assert prune.sparsity(mask) == pytest.approx(0.9, abs=1e-3)
    for name in set(every) - set(without):
        path = net.layer(name).kernel
        flat = flatten_named(pruned)[0][path]
        assert np.count_nonzero(flat) == flat.size
    with pytest.raises(ValueError, match="kinds must be a sequence of dense and conv"):
        prune.prunable(net, kinds="dense")


def test_a_layer_of_a_stack_is_pruned_alone():
    def apply_fn(p, x):
        return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, p["w"])[0] @ p["v"]

    tree = {"w": normal(0, 3, 4, 4), "v": normal(1, 4, 2)}
    net = vfjax.trace(apply_fn, tree, jnp.ones((2, 4)))
    mask = prune.masks(prune.magnitude(net, tree, names=["w[1]"]), 1.0)
    pruned = prune.apply(tree, mask)
    assert (pruned["w"][1] == 0).all()
    np.testing.assert_array_equal(pruned["w"][::2], tree["w"][::2])


def test_weights_that_are_used_twice_count_once():
    tree = {"w": normal(0, 4, 4)}
    net = vfjax.trace(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"], tree, jnp.ones((2, 4)))
    scores = prune.magnitude(net, tree)
    assert list(scores.rows) == ["w"] and repr(scores) == "Scores(1 layer, 16 weights)"
    assert (~prune.masks(scores, 0.5)["w"]).sum() == 8


# ---------------------------------------------------------------------------------------- wanda


def test_wanda_of_a_shared_kernel_has_the_inputs_of_all_its_uses():
    tree = {"w": normal(0, 4, 6)}
    net = vfjax.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, tree, jnp.ones((1, 4)))
    x = normal(1, 7, 4)
    found = prune.wanda(net, tree, [x]).values["w"]
    w, x = np.asarray(tree["w"], np.float64), np.asarray(x, np.float64)
    # The second use reads along the other axis.
    squares = (x**2).mean(0)[:, None] + (np.tanh(x @ w) ** 2).mean(0)
    np.testing.assert_allclose(found, np.abs(w) * np.sqrt(squares), rtol=1e-5)


def test_wanda_of_a_kernel_that_the_input_slides_over():
    tree = {"k": normal(0, 3, 4, 4, 2)}

    def apply_fn(p, x):  # one example: its two filters go over the three maps of the parameters
        return lax.conv_general_dilated(p["k"], x[0], (1, 1), "VALID", dimension_numbers=DIMS)[None]

    x = normal(1, 1, 2, 2, 2, 5)
    net = vfjax.trace(apply_fn, tree, x)
    found = prune.wanda(net, tree, [x]).values["k"]
    squares = np.zeros((3, 4, 4, 2))
    for i, j in np.ndindex(3, 3):
        squares[:, i : i + 2, j : j + 2] += (np.asarray(x[0], np.float64) ** 2).sum(-1)
    np.testing.assert_allclose(found, np.abs(tree["k"]) * np.sqrt(squares), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batches_may_lie_on_several_devices(net, kind):
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    over = NamedSharding(mesh, PartitionSpec("batch"))
    tree = jax.device_put(dense(), jax.devices()[0])
    x, label = normal(20, 12, 5), jnp.arange(12) % 3
    sharded = [jax.device_put((x, label), over), (x[:5], label[:5])]
    for score in (prune.wanda, prune.fisher):
        found, expected = (score(net, tree, d) for d in (sharded, [(x, label), *sharded[1:]]))
        for path, values in found.values.items():
            np.testing.assert_allclose(values, expected.values[path], rtol=1e-5, atol=1e-9)


def test_wanda_is_its_definition(net, data):
    tree = dense()
    found = prune.wanda(net, tree, data)
    x = jnp.concatenate([x for x, _ in data])
    _, inside = net.run(tree, x, capture=["w0:act", "w1:act"])
    for path, value in (("w0", x), ("w1", inside["w0:act"]), ("w2", inside["w1:act"])):
        norms = np.sqrt((np.asarray(value, np.float64) ** 2).mean(0))
        expected = np.abs(np.asarray(tree[path], np.float64)) * norms[:, None]
        np.testing.assert_allclose(found.values[path], expected, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("stride, padding", [(1, "SAME"), (2, "VALID")])
def test_wanda_of_convolutions_has_each_weights_own_inputs(groups, stride, padding):
    tree = {"k": normal(0, 3, 2, 6 // groups, 12), "v": normal(1, 12, 2)}

    def apply_fn(p, x):
        h = lax.conv_general_dilated(
            x,
            p["k"],
            (stride, stride),
            padding,
            dimension_numbers=DIMS,
            feature_group_count=groups,
        )
        return h.mean((1, 2)) @ p["v"]

    x = normal(2, 4, 6, 5, 6)
    net = vfjax.trace(apply_fn, tree, x)
    found = prune.wanda(net, tree, [x[:3], x[3:]]).values["k"]
    patches = lax.conv_general_dilated_patches(
        x, (3, 2), (stride, stride), padding, dimension_numbers=DIMS
    )
    squares = (np.asarray(patches, np.float64) ** 2).sum((0, 1, 2)) / len(x)
    squares = squares.reshape(groups, 6 // groups, 3, 2)  # the channels come first
    group = np.arange(12) // (12 // groups)
    expected = np.abs(tree["k"]) * np.sqrt(squares[group]).transpose(2, 3, 1, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wanda_of_heads():
    """Each head's kernel meets its own inputs."""
    tree = {"w": normal(0, 5, 2, 3), "o": normal(1, 2, 3, 4)}

    def apply_fn(p, x):
        h = jnp.einsum("btc,chd->bthd", x, p["w"])
        return jnp.einsum("bthd,hdo->bto", jnp.tanh(h), p["o"]).mean(1)

    x = normal(2, 3, 4, 5)
    net = vfjax.trace(apply_fn, tree, x)
    found = prune.wanda(net, tree, [x]).values["o"]
    h = np.tanh(np.einsum("btc,chd->bthd", x, tree["w"]).astype(np.float64))
    expected = np.abs(tree["o"]) * np.sqrt((h**2).sum((0, 1)) / 3)[..., None]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --------------------------------------------------------------------------------------- fisher


def each_gradient(net, tree, data):
    """float64 `[N, weights]` by leaf."""

    def loss(tree, x, label):
        return -jax.nn.log_softmax(net.run(tree, x[None]))[0, label]

    found = [jax.grad(loss)(tree, x, y) for xs, ys in data for x, y in zip(xs, ys, strict=True)]
    return {
        path: np.stack([np.asarray(g[path], np.float64) for g in found])
        for path in ("w0", "w1", "w2")
    }


# On CPU, gradients of 8 MiB are computed at once: one of the first network, five of the second, all
# of the last.
@pytest.mark.parametrize("width, count", [(1024, 4), (640, 12), (8, 12)])
def test_fisher_is_its_definition(data, width, count):
    data = [(x[:count], y[:count]) for x, y in data]
    tree = dense(width=width)
    tree["w1"] *= width**-0.5
    net = vfjax.trace(mlp, tree, data[0][0])
    found = prune.fisher(net, tree, data)
    for path, each in each_gradient(net, tree, data).items():
        expected = np.asarray(tree[path], np.float64) ** 2 * (each**2).mean(0) / 2
        np.testing.assert_allclose(
            found.values[path], expected, rtol=1e-3, atol=1e-6 * expected.max()
        )


@pytest.mark.parametrize(
    "change, kind, message",
    [
        ({"examples": 0}, ValueError, "examples must be 1 or more, got 0"),
        ({"examples": 1.5}, TypeError, "examples must be an integer, got 1.5"),
        ({"data": [normal(0, 2, 5)]}, TypeError, "must be a pair .* the loss needs labels"),
        ({"data": [(normal(0, 2, 4), [0, 1])]}, ValueError, r"shape \(2, 4\), but the network"),
        (
            {"data": [(np.ones((2, 5), np.float16), [0, 1])]},
            TypeError,
            "float16, but the network was traced with float32",
        ),
    ],
)
def test_gradients_say_what_is_wrong(net, data, change, kind, message):
    with pytest.raises(kind, match=message):
        prune.fisher(net, dense(), **{"data": data} | change)


@pytest.mark.parametrize("block", [None, 7, 24, 40])
@pytest.mark.parametrize("minibatch", [1, 3])
def test_woodfisher_is_the_inverse_of_each_block(net, data, block, minibatch):
    tree, damping, count = dense(), 1e-2, 24 // minibatch
    options = {"count": count, "minibatch": minibatch, "damping": damping, "block_size": block}
    found = prune.inverse_fisher(net, tree, data, **options)
    for path, each in each_gradient(net, tree, data).items():
        # Rows are outputs, as the layer has them.
        each = each.transpose(0, 2, 1).reshape(24, -1)
        each = each.reshape(count, minibatch, -1).mean(1)
        n = each.shape[1]
        flat = np.asarray(tree[path], np.float64).T.reshape(-1)
        for start in range(0, n, block or n):
            part = each[:, start : start + (block or n)]
            matrix = damping * np.eye(part.shape[1]) + part.T @ part / count
            inverse = np.linalg.inv(matrix)
            recursion = np.eye(part.shape[1]) / damping
            for g in part:
                step = recursion @ g
                recursion -= np.outer(step, step) / (count + g @ step)
            np.testing.assert_allclose(recursion, inverse, rtol=1e-6, atol=1e-6 / damping)
            place = slice(start, start + part.shape[1])
            diagonal = found.diagonal[path].reshape(-1)[place]
            np.testing.assert_allclose(diagonal, np.diag(inverse), rtol=1e-3)
            scores = found.scores.of(path).reshape(-1)[place]
            np.testing.assert_allclose(scores, flat[place] ** 2 / 2 / diagonal, rtol=1e-6)
            vector = np.zeros(n)
            vector[place] = np.arange(part.shape[1]) / 7
            solved = found.solve(path, vector.reshape(found.diagonal[path].shape)).reshape(-1)
            expected = inverse @ vector[place]
            np.testing.assert_allclose(
                solved[place], expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()
            )


def test_what_stays_makes_up_for_what_goes():
    """With one weight gone, the others are the best there are for the measured quadratic."""
    tree = {"w": normal(0, 4, 1)}
    x = normal(1, 30, 4)
    data = [(x, jnp.zeros(30, int))]
    net = vfjax.trace(lambda p, x: x @ p["w"], tree, x)

    def loss(z, label):
        return z.sum() + 0.0 * label.sum()

    found = prune.inverse_fisher(net, tree, data, count=30, damping=1e-3, loss=loss)
    mask = {"w": np.array([[True], [False], [True], [True]])}
    pruned = found.prune(tree, mask)["w"].ravel()
    matrix = 1e-3 * np.eye(4) + np.asarray(x, np.float64).T @ np.asarray(x, np.float64) / 30
    w, rest = np.asarray(tree["w"], np.float64).ravel(), [0, 2, 3]
    # Minimise (v - w)^T F (v - w) with v[1] = 0.
    best = w[rest] + np.linalg.solve(matrix[np.ix_(rest, rest)], matrix[rest, 1] * w[1])
    assert pruned[1] == 0
    np.testing.assert_allclose(pruned[np.array(rest)], best, rtol=1e-4)
    risen = (pruned - w) @ matrix @ (pruned - w) / 2
    np.testing.assert_allclose(found.scores.values["w"].ravel()[1], risen, rtol=1e-3)


@pytest.mark.parametrize("block", [None, 5])
def test_changes_may_be_computed_together(block):
    """Of all trees without some weights the best for the measured quadratic, block by block."""
    tree, x = {"w": normal(0, 10, 1)}, normal(1, 6, 10)
    found = linear(tree, x)(damping=1e-2, block_size=block)
    gone = np.isin(np.arange(10), [1, 2, 5, 8, 9])
    mask = {"w": ~gone[:, None]}
    w, x = (np.asarray(a, np.float64) for a in (tree["w"].ravel(), x))
    matrix = 1e-2 * np.eye(10) + x.T @ x / 6
    if block:
        matrix[:5, 5:] = matrix[5:, :5] = 0
    best = np.zeros(10)
    best[~gone] = w[~gone] + np.linalg.solve(
        matrix[np.ix_(~gone, ~gone)], matrix[np.ix_(~gone, gone)] @ w[gone]
    )
    together, summed = (
        np.asarray(found.prune(tree, mask, jointly=jointly)["w"], np.float64).ravel()
        for jointly in (True, False)
    )
    np.testing.assert_allclose(together, best, rtol=1e-4, atol=1e-6)
    risen = [(v - w) @ matrix @ (v - w) for v in (together, summed)]
    assert risen[0] < 0.9 * risen[1]


def test_memory_is_told_before_it_is_taken(net, data):
    with pytest.raises(ValueError, match=r"4000 gradients of 128 weights .* take 0\.\d GiB, more"):
        prune.woodfisher(net, dense(), data, count=4000, max_memory=1 << 20)
    for block in (None, 7, 50):
        found = prune.inverse_fisher(net, dense(), data, count=9, block_size=block)
        held = [*found.gradients.values(), *(f for row in found.factors.values() for f in row)]
        needed = prune.memory(net, count=9, block_size=block)
        # And three copies, in float64, of the gradients by the weights of one block.
        assert needed == sum(a.nbytes for a in held) + 24 * 9 * min(block or 64, 64)
    with pytest.raises(ValueError, match="data gives 24 gradients where 100 are wanted"):
        prune.woodfisher(net, dense(), data, count=100)
    with pytest.raises(ValueError, match="0 gradients, each of 20 examples of one batch, where 1 "):
        prune.woodfisher(net, dense(), data, count=1, minibatch=20)
    with pytest.raises(ValueError, match="damping must be a positive number, got 0"):
        prune.woodfisher(net, dense(), data, damping=0)


def linear(tree, x):
    """A network whose gradients are its inputs, and their WoodFisher with some options."""
    net = vfjax.trace(lambda p, x: x @ p["w"], tree, x)
    data = [(x, jnp.zeros(len(x), int))]

    def found(**options):
        return prune.inverse_fisher(
            net, tree, data, count=len(x), loss=lambda z, label: z.sum(), **options
        )

    return found


def test_no_more_memory_is_taken_than_told():
    tree, x = {"w": normal(0, 40_000, 1)}, normal(1, 40, 40_000)
    found = linear(tree, x)
    found(names=["w"])  # compiles
    net = vfjax.trace(lambda p, x: x @ p["w"], tree, x)
    told = prune.memory(net, count=40)
    tracemalloc.start()
    try:
        kept = found()
        kept.prune(tree, prune.masks(kept.scores, 0.5))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Scores, places and the like: some numbers per weight, whatever the number of gradients.
    assert most < told + 100 * 40_000


def test_damping_may_be_far_below_the_gradients():
    x = jnp.float32([[1e4, 0, 0], [0, 0, 2e-3]])
    kept = linear({"w": jnp.ones((3, 1))}, x)(damping=1e-12)
    expected = 1 / (1e-12 + (np.asarray(x, np.float64) ** 2).mean(0))
    np.testing.assert_allclose(kept.diagonal["w"].ravel(), expected, rtol=1e-6)
    # The same gradient twice: a singular matrix, to which nothing is added that is not rounded off.
    with pytest.raises(ValueError, match="damping=1e-30 is lost in the rounding .* of 'w'"):
        linear({"w": jnp.ones((3, 1))}, jnp.tile(x[:1], (2, 1)))(damping=1e-30)
    with pytest.raises(ValueError, match="gradients of 'w' hold NaN or infinite values"):
        linear({"w": jnp.ones((3, 1))}, x * jnp.nan)()


def test_the_update_takes_masks_of_other_scores(net, data):
    tree = dense()
    found = prune.inverse_fisher(net, tree, data, count=20)
    assert repr(found) == (
        "InverseFisher(Scores(3 layers, 128 weights), 20 gradients, damping=1e-05, block_size=64)"
    )
    mask = prune.masks(prune.magnitude(net, tree, names=["w1"]), 0.5)
    pruned = found.prune(tree, mask)
    for path, leaf in pruned.items():
        gone = ~np.broadcast_to(mask[path], leaf.shape)
        assert (np.asarray(leaf)[gone] == 0).all()
        assert np.array_equal(leaf, tree[path]) == (path != "w1")
    with pytest.raises(ValueError, match="mask must have the structure of the tree"):
        found.prune(tree, {"w0": mask["w0"]})
    with pytest.raises(ValueError, match=r"tree has shape \(5, 4\) at 'w0' where the measured"):
        found.prune(tree | {"w0": tree["w0"][:, :4]}, mask)


# ------------------------------------------------------------------------------------ afterwards


def test_what_is_no_scores_or_mask(net, data):
    inverse = prune.inverse_fisher(net, dense(), data, count=3)
    for wrong in (inverse, dense()):
        with pytest.raises(TypeError, match="scores must be Scores, .* InverseFisher are its"):
            prune.masks(wrong, 0.5)
    with pytest.raises(ValueError, match=r"from 0 to 1 \(0.8 is 80%\), got 80"):
        prune.masks(inverse.scores, 80)
    with pytest.raises(TypeError, match="mask must hold bools"):
        prune.sparsity(dense())


def test_pruned_weights_stay_pruned_in_training(net, data):
    tree = dense()
    mask = prune.masks(prune.magnitude(net, tree), 0.7)
    tree = prune.apply(tree, mask)
    masked = jax.tree.map(lambda m: np.ndim(m) > 0, mask)
    optimiser = optax.chain(optax.adam(0.1), optax.masked(prune.keep(mask), masked))
    state = optimiser.init(tree)
    x, label = data[0]

    @jax.jit
    def step(tree, state):
        def loss(tree):
            return -jnp.take_along_axis(
                jax.nn.log_softmax(net.run(tree, x)), label[:, None], 1
            ).mean()

        updates, state = optimiser.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    trained = tree
    for _ in range(3):
        trained, state = step(trained, state)
    for path, kept in mask.items():
        assert (np.asarray(trained[path])[~np.broadcast_to(kept, trained[path].shape)] == 0).all()
        assert not np.array_equal(trained[path], tree[path])


def test_renormalisation_restores_the_unpruned_moments(net, data):
    tree = dense()
    x = [data[0][0]]
    mask = prune.masks(prune.magnitude(net, tree), 0.6)
    pruned = prune.apply(tree, mask)
    repaired = renorm.repair(net, pruned, x, references=[tree])
    sites = ["w0", "w1"]
    goal = stats.moments(net, [tree], x, sites=sites)
    found = stats.moments(net, [repaired], x, sites=sites)
    before = stats.moments(net, [pruned], x, sites=sites)
    for site in sites:
        alive = np.asarray(before.var[site][0]) > 1e-6
        np.testing.assert_allclose(found.std[site][0][alive], goal.std[site][0][alive], rtol=1e-3)
        np.testing.assert_allclose(
            found.mean[site][0][alive], goal.mean[site][0][alive], rtol=1e-3, atol=1e-3
        )
    rescaled = renorm.rescale(net, pruned, x, references=[tree])
    for path in ("w0", "w1", "w2"):  # what is gone stays so
        assert (np.asarray(repaired[path])[~mask[path]] == 0).all()
        assert (np.asarray(rescaled[path])[~mask[path]] == 0).all()


def test_corrections_beside_a_pruned_tree_are_those_of_one_model():
    tree, x = {"w": normal(0, 4, 6), "v": normal(1, 6, 2)}, normal(2, 9, 4)
    net = vfjax.trace(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], tree, x)
    pruned = prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.5))
    assert merge.as_merged(net, pruned).weights == (1.0,)
    # There is no bias to fold a shift into.
    repaired = renorm.repair(net, pruned, [x], references=[tree])
    assert repr(repaired).startswith("Merged(cut=0 of 2, models=1, weights=(1.0,), ")
    merged = renorm.repair(net, pruned, [x], references=[tree, pruned], weights=(0.25, 0.75))
    assert merged.weights == (0.25, 0.75)


@pytest.mark.parametrize("share", [0.99, 1.0])
def test_layers_without_weights_are_renormalised_to_finite_ones(net, data, share):
    tree, x = dense(), [data[0][0]]
    pruned = prune.apply(tree, prune.masks(prune.magnitude(net, tree), share, scope="layer"))
    goal = stats.moments(net, [tree], x, sites=["w0", "w1"])
    repaired = renorm.repair(net, pruned, x, references=[tree])
    found = stats.moments(net, [repaired], x, sites=["w0", "w1"])
    for site in ("w0", "w1"):
        # Constant channels only move.
        np.testing.assert_allclose(found.mean[site], goal.mean[site], rtol=1e-3, atol=1e-3)
    rescaled = renorm.rescale(net, pruned, x, references=[tree])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((repaired, rescaled)))
    relative = diagnose.features(net, pruned, x, references=[tree]).relative
    assert all(np.isfinite(value).all() for value in relative.values())
    assert share < 1 or relative["w2:act"][0] == 0


def test_nothing_pruned_is_nothing_changed(net, data):
    tree = dense()
    pruned = prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.0))
    repaired = renorm.repair(net, pruned, [data[0][0]], references=[tree])
    for path, leaf in repaired.items():
        np.testing.assert_allclose(leaf, tree[path], rtol=1e-4, atol=1e-5)


def test_features_of_a_pruned_network_relative_to_the_unpruned(net, data):
    tree = dense()
    pruned = prune.apply(tree, prune.masks(prune.magnitude(net, tree), 0.8))
    found = diagnose.features(net, pruned, [data[0][0]], references=[tree])
    same = diagnose.features(net, tree, [data[0][0]], references=[tree])
    assert np.allclose(list(same.relative.values()), 1, rtol=1e-4)
    assert (np.asarray(list(found.relative.values())) < 1).all()
