"""Interpolation: what it equals by hand, at its ends, and how often it compiles."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vfjax
from helpers import Compilations, along
from vfjax import (
    align,
    merge,
    renorm,
    stats,
    train,
)
from vfjax._passes import batching
from vfjax.diagnose import Interpolation, barrier, interpolation

# Averages of float32 leaves inside and outside of a compiled call: products and sums may be fused.
ROUNDING = 1e-5


def mlp(v, x):
    for k in (1, 2, 3):
        x = x @ v[f"w{k}"]
        x = jax.nn.relu(x + along(v[f"b{k}"], x))
    x = x @ v["head"]
    return x + along(v["bias"], x)


def normalised(v, x):
    for k in (1, 2):
        x = x @ v[f"w{k}"]
        x = (x - along(v[f"mean{k}"], x)) * along(jax.lax.rsqrt(v[f"var{k}"] + 1e-5), x)
        x = jax.nn.relu(x + along(v[f"b{k}"], x))
    return x @ v["head"]


P, H, C = 6, 8, 3
MLP = {"w1": (P, H), "w2": (H, H), "w3": (H, H), "head": (H, C)}
MLP |= {"b1": (H,), "b2": (H,), "b3": (H,), "bias": (C,)}
NORMALISED = {"w1": (P, H), "w2": (H, H), "head": (H, C)}
NORMALISED |= {f"{name}{k}": (H,) for name in ("mean", "var", "b") for k in (1, 2)}


def draw(seed, shapes):
    rng = np.random.default_rng(seed)
    tree = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
    tree |= {n: np.abs(v) for n, v in tree.items() if n.startswith("var")}
    return {
        n: v * np.float32(0.2 if v.ndim == 1 else 1.5 / np.sqrt(len(v))) for n, v in tree.items()
    }


def inputs(seed, count):
    return np.random.default_rng(seed).normal(size=(count, P)).astype(np.float32)


class Case:
    """A network, two edge models of it that have something in common, and data."""

    def __init__(self, fn, shapes):
        self.a, noise = draw(0, shapes), draw(1, shapes)
        self.net = vfjax.trace(fn, self.a, inputs(0, 4))
        b = {n: np.float32(0.8) * self.a[n] + np.float32(0.2) * noise[n] for n in shapes}
        self.b = self.net.spec.permute(b, self.net.spec.random(jax.random.key(1), b))
        self.trees = [self.a, self.b]
        self.data = [inputs(2, 40)]
        x = inputs(3, 70)
        label = np.array(jnp.argmax(fn(self.a, jnp.asarray(x)), -1))
        label[::5] = (label[::5] + 1) % C  # so that nothing is always right
        self.test = [(x[:40], label[:40]), (x[40:], label[40:])]

    def __call__(self, trees=None, **options):
        trees = self.trees if trees is None else trees
        return interpolation(self.net, trees, self.test, progress=False, **options)

    def evaluate(self, tree):
        return train.evaluate(forward, merge.as_merged(self.net, tree), self.test)


def forward(merged, x):
    return merged.run(x)


@pytest.fixture(scope="module")
def plain():
    with jax.numpy_rank_promotion("raise"):
        return Case(mlp, MLP)


@pytest.fixture(scope="module")
def norms():
    with jax.numpy_rank_promotion("raise"):
        return Case(normalised, NORMALISED)


# ------------------------------------------------------------------------------------------ barrier


def test_barrier_by_hand():
    alphas, accuracies = np.arange(5) / 4, [0.9, 0.6, 0.3, 0.2, 0.5]
    # The line falls from 0.9 to 0.5: 0.9, 0.8, 0.7, 0.6, 0.5.
    assert barrier(alphas, accuracies) == pytest.approx(0.4)
    assert barrier(alphas, accuracies, definition="reference") == pytest.approx(0.7 - 0.2)


def test_barrier_definitions_agree_where_ends_do():
    alphas, accuracies = [0, 0.3, 1], [0.75, 0.25, 0.75]
    assert barrier(alphas, accuracies) == barrier(alphas, accuracies, definition="reference") == 0.5


@pytest.mark.parametrize("definition", ["paper", "reference"])
def test_barrier_of_nothing_and_its_units(definition):
    alphas, rng = np.linspace(0, 1, 11), np.random.default_rng(0)
    assert barrier(alphas, np.full(11, 0.9), definition=definition) == 0
    curve = rng.uniform(size=11)
    once = barrier(alphas, curve, definition=definition)
    assert barrier(alphas, 100 * curve - 7, definition=definition) == pytest.approx(100 * once)
    order = rng.permutation(11)
    assert barrier(alphas[order], curve[order], definition=definition) == once
    assert barrier(alphas[1:-1], curve[1:-1], definition=definition, ends=curve[[0, -1]]) <= once


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": [0, 2]}, "alphas must be from 0 to 1, got 2"),
        ({"alphas": [0, 0.5]}, "alphas must hold 0 and 1"),
        ({"accuracies": [0.5]}, "one for each of 2 alphas"),
        ({"definition": "code"}, 'definition must be "paper" or "reference"'),
        ({"ends": [0.5]}, "ends must be two"),
    ],
)
def test_barrier_errors(options, message):
    options = {"alphas": [0, 1], "accuracies": [0.5, 0.5]} | options
    with pytest.raises(ValueError, match=message):
        barrier(options.pop("alphas"), options.pop("accuracies"), **options)


def test_record():
    found = Interpolation(
        alphas=np.array([0.0, 0.5, 1.0]),
        loss=np.array([1.0, 3.0, 1.5]),
        accuracy=np.array([0.5, 0.25, 0.5]),
        edge_loss=np.array([0.5, 1.5]),
        edge_accuracy=np.array([1.0, 0.5]),
    )
    # A renormalisation that hurts the edge models counts, too.
    assert found.barrier == 0.5
    assert found.reference_barrier == 0.5
    assert found.loss_barrier == 2.0
    assert "barrier 0.5" in repr(found)
    doubled = jax.tree.map(lambda v: 2 * v, found)
    assert isinstance(doubled, Interpolation)
    np.testing.assert_array_equal(doubled.loss, 2 * found.loss)
    with pytest.raises(AttributeError):
        found.loss = 0


# ------------------------------------------------------------------------------------------ by hand


RENORMALISE = {
    None: lambda net, merged, data, trees: merged,
    "repair": lambda net, merged, data, trees: renorm.repair(net, merged, data, references=trees),
    "rescale": lambda net, merged, data, trees: renorm.rescale(net, merged, data, references=trees),
    "bias_calibration": lambda net, merged, data, trees: renorm.calibrate_bias(
        net, merged, references=trees
    ),
    ("remove_bias", 2): lambda net, merged, data, trees: renorm.remove_bias(net, merged, last=2),
}


def by_hand(case, aligned, alpha, renormalise, layers=0):
    weights = (1 - alpha, alpha)
    merged = merge.preserve_first(case.net, [case.a, aligned], layers=layers, weights=weights)
    model = renormalise(case.net, merged, case.data, [case.a, aligned])
    logits = np.concatenate([model(x) for x, _ in case.test]).astype(np.float64)
    label = np.concatenate([label for _, label in case.test])
    chosen = logits[np.arange(len(label)), label]
    loss = np.log(np.exp(logits).sum(-1)) - chosen
    return train.Evaluation(np.mean(logits.argmax(-1) == label), loss.mean(), len(label))


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("name", RENORMALISE)
def test_equals_merging_by_hand(plain, name, layers):
    found = plain(alphas=3, match="activation", renormalise=name, data=plain.data, layers=layers)
    matched = align.match_activations(plain.net, plain.a, plain.b, plain.data)
    aligned = plain.net.spec.permute(plain.b, matched.permutations)
    for k, alpha in enumerate(found.alphas):
        expected = by_hand(plain, aligned, float(alpha), RENORMALISE[name], layers)
        assert found.accuracy[k] == expected.accuracy
        assert found.loss[k] == pytest.approx(expected.loss, rel=ROUNDING)


def test_reset_equals_merging_by_hand(norms):
    found = norms(alphas=[0.0, 0.25, 1.0], renormalise="reset", data=norms.data)
    for k, alpha in enumerate(found.alphas):
        merged = merge.interpolate(norms.trees, alpha=float(alpha))
        expected = norms.evaluate(renorm.reset(norms.net, merged, norms.data))
        assert found.loss[k] == pytest.approx(expected.loss, rel=ROUNDING)
    # RESET changes the edge models, too; barriers go by the models themselves.
    edges = [norms.evaluate(tree) for tree in norms.trees]
    assert found.edge_loss.tolist() == [edge.loss for edge in edges]
    assert not np.allclose(found.loss[[0, 2]], found.edge_loss)


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_ends_are_the_edge_models(plain, layers):
    found = plain(layers=layers)
    edges = [plain.evaluate(tree) for tree in plain.trees]
    assert found.accuracy[[0, -1]].tolist() == [edge.accuracy for edge in edges]
    assert found.edge_accuracy.tolist() == [edge.accuracy for edge in edges]
    np.testing.assert_allclose(found.loss[[0, -1]], [e.loss for e in edges], rtol=ROUNDING)
    np.testing.assert_array_equal(found.edge_loss, found.loss[[0, -1]])
    np.testing.assert_array_equal(found.alphas, np.arange(11) / 10)


def test_calibrated_biases_keep_the_ends(plain):
    found = plain(alphas=2, renormalise="bias_calibration")
    np.testing.assert_array_equal(found.accuracy, found.edge_accuracy)
    np.testing.assert_allclose(found.loss, found.edge_loss, rtol=ROUNDING)


def test_a_barrier_is_not_negative():
    """The paper's maximum runs over the ends too."""
    assert barrier([0.5], [0.9], ends=(0.5, 0.5)) == 0
    assert barrier([0.5], [0.9], ends=(0.5, 0.5), definition="reference") == pytest.approx(-0.4)
    assert np.isnan(barrier([0.5], [np.nan], ends=(0.5, 0.5)))


def test_matching_where_nothing_can_be_permuted():
    def apply_fn(v, x):
        return jax.nn.relu(x @ v["w"])

    trees = [draw(seed, {"w": (P, C)}) for seed in (0, 1)]
    net = vfjax.trace(apply_fn, trees[0], inputs(0, 4))
    test = [(inputs(3, 8), np.zeros(8, np.int32))]
    options = {"alphas": 3, "progress": False, "data": [inputs(2, 8)]}
    found = interpolation(net, trees, test, match="activation", **options)
    np.testing.assert_array_equal(found.loss, interpolation(net, trees, test, **options).loss)


def test_modules_and_dictionaries():
    """An Equinox module, an NNX one, and inputs that are a dict with integers."""
    x = inputs(3, 16)
    label = np.arange(16) % C
    tokens = {"token": np.arange(16, dtype=np.int32) % 4, "x": x}

    def looked_up(v, x):
        return jax.nn.relu(v["table"][x["token"]] + x["x"] @ v["w"]) @ v["head"]

    plain = [draw(k, {"table": (4, H), "w": (P, H), "head": (H, C)}) for k in (0, 1)]
    parts = [
        eqx.partition(eqx.nn.MLP(P, C, H, 1, key=jax.random.key(k)), eqx.is_array) for k in (0, 1)
    ]

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first, self.head = nnx.Linear(P, H, rngs=rngs), nnx.Linear(H, C, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.relu(self.first(x)))

    graphs, states = zip(*(nnx.split(Net(nnx.Rngs(k))) for k in (0, 1)), strict=True)
    for fn, trees, batch in (
        (looked_up, plain, tokens),
        (
            lambda p, x: jax.vmap(eqx.combine(p, parts[0][1]))(x),
            [params for params, _ in parts],
            x,
        ),
        (lambda s, x: nnx.merge(graphs[0], s)(x), states, x),
    ):
        net = vfjax.trace(fn, trees[0], batch)
        options = {"alphas": 3, "progress": False}
        found = interpolation(net, trees, [(batch, label)], **options)
        for alpha, loss in zip(found.alphas, found.loss, strict=True):
            logits = jax.jit(fn)(merge.interpolate(trees, (1 - alpha, alpha)), batch)
            wanted = -np.asarray(jax.nn.log_softmax(logits))[np.arange(16), label].mean()
            assert loss == pytest.approx(wanted, rel=ROUNDING)
        repaired = interpolation(
            net, trees, [(batch, label)], match="activation", renormalise="repair", data=[batch],
            **options,
        )  # fmt: skip
        assert np.isfinite(repaired.loss).all()


def test_a_model_and_itself_have_no_barrier(plain):
    found = plain([plain.a, plain.a], alphas=5)
    assert found.barrier == found.reference_barrier == 0
    assert abs(found.loss_barrier) < ROUNDING


def test_a_model_and_its_permutation_have_no_barrier_after_matching(plain):
    b = plain.net.spec.permute(plain.a, plain.net.spec.random(jax.random.key(2), plain.a))
    assert plain([plain.a, b], alphas=3).barrier > 0.1
    for options in ({"match": "weight", "key": jax.random.key(0)}, {"match": "activation"}):
        found = plain([plain.a, b], alphas=3, data=plain.data, **options)
        assert found.barrier == 0
        assert abs(found.loss_barrier) < ROUNDING


def test_matching_by_a_function(plain):
    found = align.match_weights(plain.net, plain.a, plain.b, key=jax.random.key(0))
    aligned = plain.net.spec.permute(plain.b, found.permutations)
    expected = plain([plain.a, aligned], alphas=[0.5])
    named = plain(alphas=[0.5], match="weight", key=jax.random.key(0))
    for match in (lambda a, b: found, lambda a, b: aligned):
        assert plain(alphas=[0.5], match=match).loss == expected.loss == named.loss


def test_renormalising_by_a_function(plain):
    moments = stats.moments(plain.net, plain.trees, plain.data, sites="all")
    seen = []

    def renormalise(merged, references, data):
        seen.append((merged.weights, references))
        return renorm.rescale(plain.net, merged, data, references=references, sites="all")

    found = plain(alphas=3, renormalise=renormalise, data=plain.data, references=moments)
    assert [weights for weights, _ in seen] == [(1, 0), (0.5, 0.5), (0, 1)]
    assert all(references is moments for _, references in seen)
    merged = merge.interpolate(plain.trees, alpha=0.5)
    expected = renorm.rescale(plain.net, merged, plain.data, references=moments, sites="all")
    assert found.loss[1] == pytest.approx(plain.evaluate(expected).loss, rel=ROUNDING)
    # A tree does as well, and without references it gets the aligned trees.
    found = plain(alphas=[0.5], renormalise=lambda merged, references, data: references[1])
    assert found.loss[0] == found.edge_loss[1]


def test_references_may_be_moments(plain):
    moments = stats.moments(plain.net, plain.trees, plain.data)
    expected = plain(alphas=3, renormalise="repair", data=plain.data)
    found = plain(alphas=3, renormalise="repair", data=plain.data, references=moments)
    np.testing.assert_array_equal(found.loss, expected.loss)


def test_corrections_that_do_not_fold():
    def masked(v, x):
        x = jax.nn.relu(x @ (v["w1"] * v["mask"]))
        return jax.nn.relu(x @ v["w2"]) @ v["head"]

    case = Case(masked, {"w1": (P, H), "mask": (P, H), "w2": (H, H), "head": (H, C)})
    found = case(alphas=[0.25], renormalise="rescale", data=case.data)
    expected = by_hand(case, case.b, 0.25, RENORMALISE["rescale"])
    assert found.loss[0] == pytest.approx(expected.loss, rel=ROUNDING)


def test_edge_models_are_measured_where_no_alpha_has_them(plain):
    whole, inner = plain(alphas=3), plain(alphas=[0.5])
    np.testing.assert_array_equal(inner.edge_loss, whole.loss[[0, 2]])
    np.testing.assert_array_equal(inner.edge_accuracy, whole.accuracy[[0, 2]])
    assert inner.loss[0] == whole.loss[1]


# ------------------------------------------------------------------------------------ compilations


@pytest.mark.parametrize("name", [*RENORMALISE, "reset"])
def test_new_alphas_compile_nothing(plain, norms, name):
    case = norms if name == "reset" else plain
    options = {"renormalise": name, "data": case.data, "layers": 1}
    case(alphas=[0.5], **options)
    with Compilations() as compiled:
        case(alphas=[0.125, 0.3, 1.0], **options)
    assert compiled.count == 0


def test_one_program_evaluates_all_alphas():
    counts = []
    for alphas in (2, 11):
        case = Case(mlp, MLP)  # nothing is compiled for its network yet
        with Compilations() as compiled:
            case(alphas=alphas, renormalise="repair", data=case.data)
        counts.append(compiled.count)
    assert counts[0] >= counts[1] > 0


def test_data_is_read_once(plain, monkeypatch):
    def one_shot():
        return iter(plain.test)

    found = interpolation(
        plain.net,
        plain.trees,
        one_shot(),
        alphas=3,
        renormalise="rescale",
        data=iter(plain.data),
        progress=False,
    )
    expected = plain(alphas=3, renormalise="rescale", data=plain.data)
    np.testing.assert_array_equal(found.loss, expected.loss)
    # What does not fit is read anew each time.
    monkeypatch.setattr(batching, "_KEEP_BYTES", 100)
    found = plain(alphas=3, renormalise="rescale", data=plain.data)
    np.testing.assert_array_equal(found.loss, expected.loss)
    with pytest.raises(ValueError, match="exhausted"):
        interpolation(plain.net, plain.trees, one_shot(), progress=False)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alphas": [0.5, 1.1]}, ValueError, "alphas must be from 0 to 1, got 1.1"),
        ({"alphas": [float("nan")]}, ValueError, "alphas must be from 0 to 1, got nan"),
        ({"alphas": []}, ValueError, "alphas must be a sequence"),
        ({"alphas": 0.5}, ValueError, "alphas must be a sequence"),
        ({"alphas": 1}, ValueError, "at least 2"),
        ({"alphas": "all"}, TypeError, "alphas must be numbers"),
        ({"match": "weights"}, ValueError, "match must be one of weight, activation"),
        ({"match": 3}, TypeError, "match must be"),
        ({"match": "weight"}, ValueError, "key=jax.random.key"),
        ({"match": "activation"}, ValueError, "give data"),
        ({"renormalise": "REPAIR"}, ValueError, "renormalise must be one of reset"),
        ({"renormalise": "remove_bias"}, ValueError, r'\("remove_bias", last\)'),
        ({"renormalise": ("repair", 3)}, ValueError, "renormalise must be"),
        ({"renormalise": 3}, TypeError, "renormalise must be"),
        ({"renormalise": ("remove_bias", 9)}, ValueError, "last must be"),
        ({"renormalise": "repair"}, ValueError, "give data"),
        ({"renormalise": "reset", "data": [inputs(0, 4)]}, ValueError, "nothing to reset"),
        ({"layers": 5}, ValueError, "layers was 5"),
        ({"data": inputs(0, 4)}, ValueError, "pass a list of batches"),
    ],
)
def test_errors(plain, options, error, message):
    with pytest.raises(error, match=message):
        plain(**options)


def test_errors_of_models_and_test_data(plain):
    with pytest.raises(ValueError, match="trees must be two"):
        plain([plain.a])
    with pytest.raises(TypeError, match="trees must be"):
        plain(plain.a)
    with pytest.raises(TypeError, match="net must be a Network"):
        interpolation(mlp, plain.trees, plain.test)
    with pytest.raises(TypeError, match="test_data.*pair"):
        interpolation(plain.net, plain.trees, [inputs(0, 4)])
    other = Case(mlp, MLP).net
    wrong = merge.as_merged(other, plain.a)
    with pytest.raises(ValueError, match="another network"):
        plain(alphas=2, renormalise=lambda *_: wrong)
