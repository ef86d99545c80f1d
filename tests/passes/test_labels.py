"""Labels are what the loss takes: class numbers by default, any tree of arrays for a caller's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import assert_close, of_shapes, traced
from vfjax import diagnose, merge, prune, train

RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3)).astype(np.float32)
SHAPES = {"w": (3, 4), "v": (4, 2)}


def fn(v, x):
    return jax.nn.relu(x @ v["w"]) @ v["v"]


def two(v, x):
    """A box and a class, as detectors return them."""
    h = jax.nn.relu(x @ v["w"])
    return {"box": h @ v["v"], "class": h @ v["c"]}


def tokens(v, x):
    """Logits `[n, 5, 2]` of sequences."""
    h = jax.nn.relu(x[:, :, None] * v["w"][0][None, None])
    return h @ v["v"]


def mse(y, target):
    return jnp.square(y - target).mean()


def cross_entropy(y, onehot):
    return -(jax.nn.log_softmax(y) * onehot).sum(-1).mean()


def right(y, onehot):
    return (y.argmax(-1) == onehot.argmax(-1)).mean()


def per_token(y, ids):
    return -jnp.take_along_axis(jax.nn.log_softmax(y), ids[..., None], -1).mean()


def multi_hot(y, hot):
    return (jnp.logaddexp(0, y) - y * hot).mean()


def joint(y, label):
    hot = jax.nn.one_hot(label["class"], 3)
    return mse(y["box"], label["box"]) + cross_entropy(y["class"], hot)


CLASS = RNG.integers(0, 2, 10)
# Of each kind of label: the network, its shapes, its input, the loss, and the labels.
KINDS = {
    "reals": (fn, SHAPES, X, mse, RNG.normal(size=(10, 2)).astype(np.float32)),
    "one number": (lambda v, x: fn(v, x).sum(-1), SHAPES, X, mse, np.float32(CLASS) / 2),
    "multi-hot": (fn, SHAPES, X, multi_hot, RNG.integers(0, 2, (10, 2)).astype(bool)),
    "tokens": (tokens, SHAPES, X[:, [0, 1, 2, 0, 1]], per_token, RNG.integers(0, 2, (10, 5))),
    "trees": (
        two,
        SHAPES | {"c": (4, 3)},
        X,
        joint,
        {"box": RNG.normal(size=(10, 2)).astype(np.float32), "class": RNG.integers(0, 3, 10)},
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def rows(tree, *places):
    return jax.tree.map(lambda a: a[slice(*places)], tree)


def split(x, label, at=6):
    return [(x[:at], rows(label, 0, at)), (x[at:], rows(label, at, None))]


def test_scores_by_fisher_are_of_each_examples_gradient(kind):
    fn, shapes, x, loss, label = kind
    net, tree = traced(fn, shapes, x.shape), of_shapes(shapes, 1)

    @jax.jit
    def gradient(v, x, label):
        return jax.grad(lambda v: loss(fn(v, x), label))(v)

    each = [gradient(tree, x[k : k + 1], rows(label, k, k + 1)) for k in range(len(x))]
    found = prune.fisher(net, tree, split(x, label), loss=loss).values
    for path, weights in tree.items():
        g = np.stack([np.asarray(one[path], np.float64) for one in each])
        wanted = np.asarray(weights, np.float64) ** 2 * (g**2).mean(0) / 2
        if path in found:  # a scale is no layer
            assert_close(found[path], wanted, 1e-5)
    inverse = prune.inverse_fisher(net, tree, split(x, label), loss=loss, count=10, damping=1e-2)
    path = "v"
    g = np.stack([np.asarray(one[path], np.float64).T.reshape(-1) for one in each])
    matrix = g.T @ g / len(g) + 1e-2 * np.eye(g.shape[1])
    assert_close(inverse.diagonal[path].reshape(-1), np.diag(np.linalg.inv(matrix)), 1e-4)
    again = prune.woodfisher(net, tree, split(x, label), loss=loss, count=10, damping=1e-2)
    assert_close(again.values[path], inverse.scores.values[path], 1e-6)


def test_curves_are_of_the_callers_loss(kind):
    fn, shapes, x, loss, label = kind
    net, trees = traced(fn, shapes, x.shape), [of_shapes(shapes, seed) for seed in (1, 2)]

    def negated(y, label):
        return -loss(y, label)

    options = {"loss": loss, "alphas": 3, "progress": False}
    curve = diagnose.interpolation(net, trees, split(x, label), **options)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *trees)
    wanted = [float(loss(fn(tree, x), label)) for tree in (trees[0], mean, trees[1])]
    assert_close(curve.loss, wanted, 1e-5)
    assert_close(curve.edge_loss, wanted[::2], 1e-5)
    gap = max(wanted[1] - (wanted[0] + wanted[2]) / 2, 0)
    assert curve.loss_barrier == pytest.approx(gap, abs=1e-5)
    # Without class numbers there is no accuracy, and nothing pretends that there is.
    assert curve.accuracy is None and curve.edge_accuracy is None
    assert repr(curve).startswith("Interpolation(3 alphas, loss ")
    for what in ("barrier", "reference_barrier"):
        with pytest.raises(ValueError, match="no accuracy.*see loss_barrier, or give .* score="):
            getattr(curve, what)
    scored = diagnose.interpolation(net, trees, split(x, label), score=negated, **options)
    assert_close(scored.accuracy, [-loss for loss in wanted], 1e-5)
    assert scored.barrier == pytest.approx(gap, abs=1e-5)


def test_an_evaluation_is_the_mean_over_all_examples(kind):
    fn, shapes, x, loss, label = kind
    tree = of_shapes(shapes, 1)
    found = train.evaluate(fn, tree, split(x, label), loss=loss)
    assert found.accuracy is None and found.count == 10
    assert found.loss == pytest.approx(float(loss(fn(tree, x), label)), rel=1e-5)


def test_class_numbers_and_one_hot_rows_are_the_same():
    net, trees = traced(fn, SHAPES, X.shape), [of_shapes(SHAPES, seed) for seed in (1, 2)]
    hot = np.eye(2, dtype=np.float32)[CLASS]
    numbers, hots = split(X, CLASS), split(X, hot)
    options = {"alphas": 3, "progress": False}
    plain = diagnose.interpolation(net, trees, numbers, **options)
    given = {"loss": cross_entropy, "score": right}
    found = diagnose.interpolation(net, trees, hots, **given, **options)
    assert_close(found.loss, plain.loss, 1e-6)
    assert_close(found.accuracy, plain.accuracy, 1e-6)
    for score in (prune.fisher, prune.woodfisher):
        count = {"count": 10} if score is prune.woodfisher else {}
        wanted = score(net, trees[0], numbers, **count).values
        for path, values in score(net, trees[0], hots, loss=cross_entropy, **count).values.items():
            assert_close(values, wanted[path], 1e-4)
    # With a loss of class numbers there is an accuracy all the same.
    numbered = train.evaluate(
        lambda m, x: m(x), merge.ensemble(net, trees), numbers, loss=lambda y, k: y.mean()
    )
    assert (
        numbered.accuracy
        == train.evaluate(lambda m, x: m(x), merge.ensemble(net, trees), numbers).accuracy
    )


def test_plain_lists_are_labels():
    wanted = train.evaluate(fn, of_shapes(SHAPES, 1), [(X, np.float32(CLASS)[:, None])], loss=mse)
    label = [[float(k)] for k in CLASS]
    assert train.evaluate(fn, of_shapes(SHAPES, 1), [(X, label)], loss=mse) == wanted


# --------------------------------------------------------------------------------------- errors

BAD_LABELS = [
    (
        {"a": np.zeros(10), "b": np.zeros(9)},
        ValueError,
        r"label\['b'\] must be equally many, got 9",
    ),
    (None, TypeError, "label must hold arrays, got None"),
    ({}, TypeError, r"label must hold arrays, got \{\}"),
    ("abc", TypeError, "label must be an array of numbers, got str 'abc'"),
    (np.array(["a"] * 10), TypeError, "label must be an array of numbers, got ndarray"),
    (np.array([None] * 10), TypeError, "label must be an array of numbers"),
    (3.0, ValueError, "label must have one entry per input, got the single number 3.0"),
    ({"a": 1}, ValueError, r"label\['a'\] must have one entry per input"),
]
BAD_LOSSES = [
    ({"loss": lambda y, t: None}, "loss.output, label. must return one real number.*NoneType"),
    ({"loss": lambda y, t: (y - t) ** 2}, r"loss.* returned shape \[\d+, 2\]; take its mean"),
    ({"loss": lambda y, t: (y.mean(), y)}, "loss.* returned tuple"),
    ({"loss": lambda y, t: y.mean() * 1j}, "loss.* returned complex64"),
    (
        {"loss": lambda y, t: np.asarray(y).mean()},
        "loss.* while it is compiled: .*jax.numpy",
    ),
    ({"loss": lambda y, t: y.sum() if y.sum() > 0 else 0.0}, "loss.* while it is compiled"),
    ({"loss": np.ones(3)}, "loss must be a function"),
    ({"loss": "mse"}, "loss must be a function.*it was 'mse'"),
]
BAD_SCORES = [
    ({"loss": mse, "score": lambda y, t: None}, "score.output, label. must return one real number"),
    ({"loss": mse, "score": lambda y, t: y}, r"score.* returned shape \[10, 2\]; take its mean"),
    ({"loss": mse, "score": 0.5}, "score must be a function.*it was 0.5"),
]
REALS = np.zeros((10, 2), np.float32)


def curve(data, **options):
    net, tree = traced(fn, SHAPES, X.shape), of_shapes(SHAPES, 1)
    return diagnose.interpolation(net, [tree, tree], data, alphas=2, progress=False, **options)


def fisher(data, **options):
    return prune.fisher(traced(fn, SHAPES, X.shape), of_shapes(SHAPES, 1), data, **options)


def woodfisher(data, **options):
    options = {"count": 10, **options}
    return prune.woodfisher(traced(fn, SHAPES, X.shape), of_shapes(SHAPES, 1), data, **options)


def evaluate(data, **options):
    return train.evaluate(fn, of_shapes(SHAPES, 1), data, **options)


READERS = [curve, fisher, woodfisher, evaluate]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("label", "error", "message"), BAD_LABELS)
def test_labels_that_no_loss_takes(reader, label, error, message):
    with pytest.raises(error, match=f"data`, batch 0: .*{message}"):
        reader([(X, label)], loss=lambda y, t: y.mean())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("options", "message"), BAD_LOSSES)
def test_losses_that_give_no_number(reader, options, message):
    with pytest.raises(TypeError, match=message):
        reader([(X, REALS)], **options)


@pytest.mark.parametrize("reader", [curve, evaluate])
@pytest.mark.parametrize(("options", "message"), BAD_SCORES)
def test_scores_that_give_no_number(reader, options, message):
    with pytest.raises(TypeError, match=message):
        reader([(X, REALS)], **options)


@pytest.mark.parametrize("reader", READERS)
def test_without_a_loss_labels_are_class_numbers(reader):
    with pytest.raises(TypeError, match=r"labels must be integers \[n\].*give loss="):
        reader([(X, REALS)])
    for wrong in (-1, 2):
        label = np.where(np.arange(10) == 3, wrong, CLASS)
        with pytest.raises(
            ValueError, match="batch 0: labels must be from 0 to 1, as .* 2 classes"
        ):
            reader([(X, label)])


@pytest.mark.parametrize("score", [prune.fisher, prune.woodfisher])
@pytest.mark.parametrize("kind", ["one number", "tokens", "trees"])
def test_without_a_loss_outputs_are_logits(score, kind):
    fn, shapes, x, _, _ = KINDS[kind]
    with pytest.raises(ValueError, match=r"must return logits \[n, classes\].*: give loss="):
        score(traced(fn, shapes, x.shape), of_shapes(shapes, 1), [(x, CLASS)])
