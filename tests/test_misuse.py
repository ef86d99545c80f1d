"""Arguments that cannot be: each names itself, says what it was, and what to do."""

from __future__ import annotations

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax import export

import vfjax
from helpers import of_shapes, traced
from vfjax import align, diagnose, merge, prune, renorm, stats, symmetry, train

SHAPES = {
    **{"w": (3, 4), "b": (4,), "mean": (4,), "var": (4,)},
    **{"u": (4, 4), "v": (4, 2)},
}
X = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
Y = np.array([0, 1] * 3)
DATA, LABELLED = [X], [(X, Y)]


def fn(v, x):
    x = x @ v["w"] + v["b"][None]
    x = (x - v["mean"][None]) * jax.lax.rsqrt(v["var"][None] + 1e-5)
    return jax.nn.relu(jax.nn.relu(x) @ v["u"]) @ v["v"]


A, B = of_shapes(SHAPES, 0), of_shapes(SHAPES, 1)
NET = functools.cache(lambda: traced(fn, SHAPES, X.shape))
KEY = functools.cache(lambda: jax.random.key(0))


@functools.cache
def found():
    return align.match_weights(NET(), A, B, key=KEY())


@functools.cache
def maps():
    return align.Maps.of_permutations([None, found().permutations])


@functools.cache
def mask():
    return prune.masks(prune.magnitude(NET(), A), 0.5)


@functools.cache
def crossings():
    return [NET().run(tree, X, stop=1) for tree in (A, B)]


def curve(trees, test=LABELLED, **options):
    options = {"alphas": 2, "progress": False, **options}
    return diagnose.interpolation(NET(), trees, test, **options)


# Functions of one tree: the name of the argument, and whether numbers are read on the host.
ONE = {
    "run": ("variables", False, lambda t: NET().run(t, X)),
    "fold": ("variables", False, lambda t: NET().fold(t, "w", jnp.ones(4), jnp.zeros(4))),
    "permute": ("variables", False, lambda t: NET().spec.permute(t, found().permutations)),
    "check_spec": ("variables", True, lambda t: vfjax.check_spec(NET(), t, X)),
    "weights a": ("a", True, lambda t: align.match_weights(NET(), t, B, key=KEY())),
    "weights b": ("b", True, lambda t: align.match_weights(NET(), A, t, key=KEY())),
    "activations": (r"trees\[1\]", True, lambda t: align.match_activations(NET(), A, t, DATA)),
    "reset": ("merged", True, lambda t: renorm.reset(NET(), t, DATA)),
    "repair": ("merged", True, lambda t: renorm.repair(NET(), t, DATA, references=[A, B])),
    "remove_bias": ("merged", False, lambda t: renorm.remove_bias(NET(), t, last=1)),
    "calibrate": ("merged", False, lambda t: renorm.calibrate_bias(NET(), t, references=[A, B])),
    "features": ("variables", True, lambda t: diagnose.features(NET(), t, DATA)),
    "report": ("variables", True, lambda t: diagnose.report(NET(), t, DATA, references=[A, B])),
    "distance": ("b", True, lambda t: diagnose.distance(A, t)),
    "cka": ("first", True, lambda t: diagnose.cka((NET(), t), (NET(), A), DATA, progress=False)),
    "product": ("merged", True, lambda t: diagnose.rescale_product(NET(), t, [A, B])),
    "magnitude": ("tree", True, lambda t: prune.magnitude(NET(), t)),
    "wanda": ("tree", True, lambda t: prune.wanda(NET(), t, DATA)),
    "fisher": ("tree", True, lambda t: prune.fisher(NET(), t, LABELLED)),
    "woodfisher": ("tree", True, lambda t: prune.woodfisher(NET(), t, LABELLED, count=4)),
    "apply": ("tree", False, lambda t: prune.apply(t, mask())),
    "evaluate": ("params", True, lambda t: train.evaluate(fn, t, LABELLED)),
}
# Functions of several trees, of which the second is bad.
MANY = {
    "interpolate": ("trees", False, merge.interpolate),
    "uniform": ("trees", False, merge.uniform_soup),
    "greedy": ("trees", False, lambda ts: merge.greedy_soup(ts, lambda t: 1.0)),
    "ensemble": ("trees", False, lambda ts: merge.ensemble(NET(), ts)(X)),
    "preserve": ("trees", False, lambda ts: merge.preserve_first(NET(), ts, layers=1)(X)),
    "partial": ("trees", False, lambda ts: merge.partial(NET(), ts)(X)),
    "moments": ("trees", True, lambda ts: stats.moments(NET(), ts, DATA)),
    "zip": ("trees", True, lambda ts: align.zip_features(NET(), ts, DATA)),
    "cca": ("trees", True, lambda ts: align.cca(NET(), ts, DATA)),
    "transport": ("trees", True, lambda ts: align.transport(NET(), ts, DATA)),
    "universe": ("trees", True, lambda ts: align.match_universe(NET(), ts, key=KEY())),
    "repair": ("references", True, lambda ts: renorm.repair(NET(), A, DATA, references=ts)),
    "calibrate": ("references", False, lambda ts: renorm.calibrate_bias(NET(), A, references=ts)),
    "features": ("references", True, lambda ts: diagnose.features(NET(), A, DATA, references=ts)),
    "curve": ("trees", True, curve),
}


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x)


def deleted():
    tree = {path: jnp.array(leaf, copy=True) for path, leaf in A.items()}
    tree["u"].delete()
    return tree


def state():
    return TrainState.create(apply_fn=Dense().apply, params=A, tx=optax.adam(1e-3))


# Of each bad tree: what it is, the error, and what of it the message says.
TREES = {
    "text": (lambda: A | {"u": "abc"}, TypeError, "has a str at 'u'"),
    "objects": (lambda: A | {"u": np.full((4, 4), None)}, TypeError, "dtype object at 'u'"),
    "letters": (lambda: A | {"u": np.full((4, 4), "x")}, TypeError, "dtype <U1 at 'u'"),
    "donated": (deleted, ValueError, "deleted array at 'u': it was donated"),
    "path": (lambda: "model.npz", TypeError, "is a str; it must be a tree of arrays"),
    "alignment": (found, TypeError, "is a Alignment; it must be a tree of arrays"),
    "function": (lambda: fn, TypeError, "has a function at '.'"),
    "state": (state, ValueError, "part 'params' has the right structure: pass that"),
    "nested": (lambda: {"params": A}, ValueError, "part 'params' has the right structure"),
}
# Functions that compare with another argument first, or call any function, name that.
OTHERWISE = {"apply", "permute", "fold", "evaluate", "check_spec"}


STRUCTURES = {"path", "alignment", "function", "state", "nested"}
SINGLE = [
    (name, bad)
    for name in ONE
    for bad in TREES
    if not (name in OTHERWISE and bad in STRUCTURES)
    and not (name == "weights a" and bad in ("state", "nested"))
]


@pytest.mark.parametrize(("name", "bad"), SINGLE)
def test_trees_that_are_none(name, bad):
    (argument, _, call), (make, error, message) = ONE[name], TREES[bad]
    with pytest.raises(error, match=f"{argument}.*{message}"):
        call(make())


@pytest.mark.parametrize("bad", TREES)
@pytest.mark.parametrize("name", MANY)
def test_one_of_several_trees_is_none(name, bad):
    (argument, _, call), (make, error, message) = MANY[name], TREES[bad]
    with pytest.raises(error, match=rf"{argument}\[1\].*{message}"):
        call([A, make()])


@pytest.mark.parametrize("name", [name for name in ONE if ONE[name][1]])
def test_functions_that_read_numbers_say_so_inside_jit(name):
    argument, _, call = ONE[name]
    with pytest.raises(TypeError, match=rf"{argument}.* is a traced value .*on the host.*outside"):
        jax.jit(lambda t: call(t) and None)(A)
    # All arguments are numbers, and what is computed of them is traced all the same.
    with pytest.raises(TypeError, match=r"on the host.*not inside.*call it outside"):
        jax.jit(lambda x: call(A) and None)(X)


@pytest.mark.parametrize("name", [name for name in MANY if MANY[name][1]])
def test_functions_of_several_trees_say_so_inside_jit(name):
    argument, _, call = MANY[name]
    with pytest.raises(TypeError, match=rf"{argument}\[1\].* is a traced value .*on the host"):
        jax.jit(lambda t: call([A, t]) and None)(B)


@pytest.mark.parametrize("name", ["run", "fold", "permute", "remove_bias", "calibrate", "apply"])
def test_other_functions_work_inside_jit_and_want_numbers_outside(name):
    _, _, call = ONE[name]
    shapes = jax.eval_shape(call, A)
    assert jax.tree.leaves(shapes)
    abstract = jax.eval_shape(lambda: A)
    with pytest.raises(TypeError, match="is a jax.ShapeDtypeStruct, .* jax.eval_shape"):
        call(abstract)


@pytest.mark.parametrize("name", [name for name in MANY if name not in ("universe",)])
def test_models_on_different_devices(name):
    argument, _, call = MANY[name]
    first, second = (jax.device_put(t, d) for t, d in zip((A, B), jax.devices(), strict=False))
    named = "crossings|trees" if name == "ensemble" else f"{argument}|merged|models"
    with pytest.raises(ValueError, match=rf"({named}).* lies on .*:0 and .* on .*:1.*device_put"):
        call([first, second])


@pytest.mark.parametrize("name", ["run", "reset", "features", "wanda", "fisher", "evaluate"])
def test_models_and_data_on_different_devices(name):
    x = jax.device_put(X, jax.devices()[1])
    tree = jax.device_put(A, jax.devices()[0])
    calls = {
        "run": lambda: NET().run(tree, x),
        "reset": lambda: renorm.reset(NET(), tree, [x]),
        "features": lambda: diagnose.features(NET(), tree, [x]),
        "wanda": lambda: prune.wanda(NET(), tree, [x]),
        "fisher": lambda: prune.fisher(NET(), tree, [(x, Y)]),
        "evaluate": lambda: train.evaluate(fn, tree, [(x, Y)]),
    }
    with pytest.raises(ValueError, match=r" lies on .*:0 and (x|data).* on .*:1.*device_put"):
        calls[name]()


def test_masks_and_permutations_on_another_device():
    tree, other = jax.device_put(A, jax.devices()[0]), jax.devices()[1]
    orders = jax.device_put(found().permutations, other)
    with pytest.raises(ValueError, match="variables.* lies on .*permutations.*device_put"):
        NET().spec.permute(tree, orders)
    with pytest.raises(ValueError, match="tree.* lies on .*mask.*device_put"):
        prune.apply(tree, jax.device_put(mask(), other))


# ------------------------------------------------------------------------------------------ data

PASSES = {
    "moments": lambda d: stats.moments(NET(), [A, B], d),
    "activations": lambda d: align.match_activations(NET(), A, B, d),
    "zip": lambda d: align.zip_features(NET(), [A, B], d),
    "reset": lambda d: renorm.reset(NET(), A, d),
    "repair": lambda d: renorm.repair(NET(), A, d, references=[A, B]),
    "features": lambda d: diagnose.features(NET(), A, d),
    "cka": lambda d: diagnose.cka((NET(), A), (NET(), B), d, progress=False),
    "wanda": lambda d: prune.wanda(NET(), A, d),
    "fisher": lambda d: prune.fisher(NET(), A, d),
    "curve": lambda d: curve([A, B], data=d, renormalise="reset"),
}
BATCHES = {
    "a single example": (
        [X[0]],
        ValueError,
        r"a single example: give it its batch axis, x\[None\]",
    ),
    "shapes": ([jax.ShapeDtypeStruct((6, 3), "float32")], TypeError, "is a jax.ShapeDtypeStruct"),
    "None": ([None], TypeError, "got PyTreeDef.None.|must be a pair"),
    "objects": ([X.astype(object)], TypeError, "dtype object"),
    "text": ("abc", TypeError, "must be an iterable of batches"),
}


@pytest.mark.parametrize("bad", BATCHES)
@pytest.mark.parametrize("name", PASSES)
def test_batches_that_are_none(name, bad):
    data, error, message = BATCHES[bad]
    if name == "fisher" and bad not in ("None", "text"):
        data = [(data[0], Y)]
        if bad == "a single example":
            data = [(X[0], Y[:3])]
    with pytest.raises(error, match=f"data.*{message}"):
        PASSES[name](data)


@pytest.mark.parametrize("name", PASSES)
def test_traced_batches(name):
    def call(x):
        PASSES[name]([(x, Y)] if name == "fisher" else [x])

    with pytest.raises(TypeError, match="on the host"):
        jax.jit(call)(X)


INPUTS = {
    "one example": (X[0], ValueError, r"x has shape \(3,\).*\[batch, 3\]: .*batch axis, x\[None\]"),
    "more axes": (X[None], ValueError, r"x has shape \(1, 6, 3\).*\[batch, 3\]: trace it anew"),
    "a scalar": (3.0, ValueError, r"x has shape \(\)"),
    "text": ("abc", TypeError, "x is a str"),
    "objects": (X.astype(object), TypeError, "x has an array of dtype object"),
    "None": (None, TypeError, "x must be an input like the one that was traced"),
    "a list": ([X], TypeError, "x must be an input like the one that was traced"),
    "a network": (NET, TypeError, "x has a function"),
    "a shape": (jax.ShapeDtypeStruct((6, 3), "float32"), TypeError, "x is a jax.ShapeDtypeStruct"),
}


@pytest.mark.parametrize("bad", INPUTS)
def test_inputs_that_are_none(bad):
    x, error, message = INPUTS[bad]
    model = merge.preserve_first(NET(), [A, B], layers=1)
    for call in (lambda: NET().run(A, x), lambda: model(x)):
        with pytest.raises(error, match=message):
            call()


def test_what_the_function_raises_for_an_input_tells_the_input():
    with pytest.raises(TypeError) as caught:
        NET().run(A, X[:, :2])
    assert "x = float32[6, 2]; it was traced with float32[6, 3]" in " ".join(caught.value.__notes__)


# --------------------------------------------------------------------------------------- weights

WEIGHTED = {
    "interpolate": lambda w: merge.interpolate([A, B], w),
    "ensemble": lambda w: merge.ensemble(NET(), [A, B], w),
    "preserve": lambda w: merge.preserve_first(NET(), [A, B], layers=1, weights=w),
    "partial": lambda w: merge.partial(NET(), [A, B], weights=w),
    "as_merged": lambda w: merge.as_merged(NET(), A, weights=w),
    "calibrate": lambda w: renorm.calibrate_bias(NET(), A, references=[A, B], weights=w),
    "repair": lambda w: renorm.repair(NET(), A, DATA, references=[A, B], weights=w),
    "features": lambda w: diagnose.features(NET(), A, DATA, references=[A, B], weights=w),
    "product": lambda w: diagnose.rescale_product(NET(), A, [A, B], weights=w),
    "crossings": lambda w: NET().average_crossings(crossings(), w),
}
WEIGHTS = {
    "strings": (["a", "b"], TypeError, r"weights\[0\] must be a number, got 'a'"),
    "digits": (["0.5", "0.5"], TypeError, r"weights\[0\] must be a number, got '0.5'"),
    "None": ([0.5, None], TypeError, r"weights\[1\] must be a number, got None"),
    "objects": ([object(), 0.5], TypeError, r"weights\[0\] must be a number"),
    "arrays": ([np.ones(2) / 2, 0.5], TypeError, r"weights\[0\] must be a number"),
    "imaginary": ([0.5j, 0.5], TypeError, r"weights\[0\] must be a number"),
    "trees": ([A, B], TypeError, r"weights\[0\] must be a number"),
    "string": ("ab", TypeError, "weights must be a sequence of numbers"),
    "number": (0.5, TypeError, "weights must be a sequence of numbers"),
}


@pytest.mark.parametrize("bad", WEIGHTS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_that_are_none(name, bad):
    weights, error, message = WEIGHTS[bad]
    with pytest.raises(error, match=message):
        WEIGHTED[name](weights)


@pytest.mark.parametrize("alpha", ["0.5", None and 0, [0.5], 0.5j, np.ones(2)])
def test_an_alpha_that_is_none(alpha):
    if alpha is not None:
        with pytest.raises(TypeError, match="alpha must be a number"):
            merge.interpolate([A, B], alpha=alpha)


# ---------------------------------------------------------------------------------- permutations


def universe():
    return align.match_universe(NET(), [A, B], key=KEY())


ORDERED = {
    "permute": ("permutations", lambda p: NET().spec.permute(B, p)),
    "of_permutations": (r"permutations\[1\]", lambda p: align.Maps.of_permutations([None, p])),
    "compose": ("first", lambda p: symmetry.compose(p, {})),
    "after": ("second", lambda p: symmetry.compose({}, p)),
    "invert": ("permutations", symmetry.invert),
    "map_crossing": ("maps", lambda p: NET().map_crossing(A, crossings()[0], p)),
}
MAPPED = {
    "partial": lambda m: merge.partial(NET(), [A, B], m),
    "repair": lambda m: renorm.repair(NET(), A, DATA, references=[A, B], maps=m),
    "calibrate": lambda m: renorm.calibrate_bias(NET(), A, references=[A, B], maps=m),
    "features": lambda m: diagnose.features(NET(), A, DATA, references=[A, B], maps=m),
    "report": lambda m: diagnose.report(NET(), A, DATA, references=[A, B], maps=m),
}


@pytest.mark.parametrize("name", ORDERED)
def test_results_in_place_of_permutations(name):
    argument, call = ORDERED[name]
    for make, hint in (
        (found, f"pass its permutations, {argument}=found.permutations"),
        (maps, "pass one of its `permutations`"),
        (universe, "pass one of its `permutations`"),
        (lambda: "abc", "as found.permutations of an Alignment"),
        (lambda: [found().permutations], "as found.permutations of an Alignment"),
    ):
        given = make()
        kind = re.escape(type(given).__name__)
        with pytest.raises(
            TypeError, match=f"{argument} must be a mapping.*it was a {kind}: .*{hint}"
        ):
            call(given)


@pytest.mark.parametrize("name", MAPPED)
def test_results_in_place_of_maps(name):
    for make, hint in (
        (found, r"Maps.of_permutations\(\[None, found.permutations\]\)"),
        (universe, r"Maps.of_permutations\(universe.permutations\)"),
        (lambda: found().permutations, "go into Maps.of_permutations"),
    ):
        with pytest.raises(TypeError, match=f"maps must be a vfjax.align.Maps, got a .*{hint}"):
            MAPPED[name](make())


def test_permutations_of_a_crossing_are_checked():
    group = next(iter(NET().spec.groups))
    call = functools.partial(NET().map_crossing, A, crossings()[0])
    with pytest.raises(ValueError, match="must have shape"):
        call({group: np.arange(3)})
    with pytest.raises(ValueError, match="is not a permutation"):
        call({group: np.zeros(4, int)})
    with pytest.raises(ValueError, match="maps has the group 'other', which the spec does not"):
        call({"other": np.arange(4)})


# ------------------------------------------------------------------------------------------- trace

NAMES = {"fn": fn, "A": A, "X": X}


def test_swapped_arguments_of_trace():
    with pytest.raises(TypeError, match=r"are they swapped\? It is vfjax.trace\(apply_fn, var"):
        vfjax.trace(fn, X, A)
    for swapped in ((A, fn, X), (A, X, fn), (X, A, fn)):
        with pytest.raises(TypeError, match=r"The order is vfjax.trace\(apply_fn, variables, x\)"):
            vfjax.trace(*swapped)


def test_states_and_bare_parameters_in_place_of_variables():
    with pytest.raises(TypeError, match=r"variables is a TrainState.*\{'params': state.params\}"):
        vfjax.trace(Dense().apply, state(), X)
    params = Dense().init(KEY(), X)["params"]
    with pytest.raises(Exception) as caught:
        vfjax.trace(Dense().apply, params, X)
    assert "variables as {'params': ...}" in " ".join(caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        vfjax.trace(fn, A | {"u": None}, X)
    assert "variables has None at \"['u']\"" in " ".join(caught.value.__notes__)


def test_sizes_of_nothing():
    for shapes, layer in (({"w": (3, 0), "v": (0, 2)}, "w"), ({"w": (3, 2), "v": (2, 0)}, "v")):
        like = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
        with pytest.raises(
            ValueError, match=rf"layer '{layer}' has a kernel of shape .*0.*one unit"
        ):
            vfjax.trace(lambda v, x: jax.nn.relu(x @ v["w"]) @ v["v"], like, X)
    with pytest.raises(ValueError, match=r"x has shape \[0, 3\], without examples"):
        vfjax.trace(fn, A, X[:0])


def test_a_single_example_is_told():
    with pytest.warns(UserWarning, match=r"no axis of examples of x = float32\[3\].*x\[None\]"):
        vfjax.trace(lambda v, x: x @ v["w"], A, X[0])


def test_symbolic_sizes():
    (size,) = export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"x has the symbolic size b in its shape \[b, 3\]"):
        vfjax.trace(fn, A, x)
    wide = A | {"w": jax.ShapeDtypeStruct((3, size), jnp.float32)}
    with pytest.raises(ValueError, match="leaf 'w' has the symbolic size b"):
        vfjax.trace(fn, wide, X)
    # What is evaluated can be exported for batches of any size.
    model = merge.preserve_first(NET(), [A, B], layers=2)
    for call in (functools.partial(NET().run, A), model):
        exported = export.export(jax.jit(call))(x)
        for rows in (X, X[:1]):
            np.testing.assert_allclose(exported.call(rows), call(rows), rtol=1e-5, atol=1e-6)


def test_names_with_markup():
    first, last = "[bold]w[/bold]", "[/red]:smile: $x"
    tree = of_shapes({first: (3, 4), last: (4, 2)}, 0)
    net = vfjax.trace(lambda v, x: jax.nn.relu(x @ v[first]) @ v[last], tree, X)
    found = diagnose.report(net, tree, DATA, references=[tree, tree])
    for text in (net.summary(), found.table()):
        assert first in text and last in text


# ------------------------------------------------------------------------------------------- soups


@pytest.mark.parametrize("score", [None, 0.5, np.ones(2)])
def test_a_score_that_is_no_function(score):
    with pytest.raises(TypeError, match="score must be a function of a tree that returns a number"):
        merge.greedy_soup([A, B], score)


@pytest.mark.parametrize("value", [None, np.ones(2), "0.5", 1j, (0.5, 0.1)])
def test_a_score_that_returns_no_number(value):
    with pytest.raises(TypeError, match="score must return one number.*it returned"):
        merge.greedy_soup([A, B], lambda tree: value)
