"""Old names work for one version more, and say what they are called now."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import vfjax
from vfjax import align, merge, prune, stats

X = jnp.ones((2, 3))
TREE = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}


@pytest.fixture(scope="module")
def net():
    return vfjax.trace(lambda v, x: x @ v["a"] @ v["b"], TREE, X)


@pytest.mark.parametrize(
    "old, new",
    [
        (lambda net: net.parameters, lambda net: net.params),
        (lambda net: net.layer("a").parameters, lambda net: net.layer("a").params),
        (lambda net: net.stem_parameters(1), lambda net: net.stem_params(1)),
        (lambda net: net.trunk_parameters(1), lambda net: net.trunk_params(1)),
        (lambda net: merge.as_merged(net, TREE).parameters, lambda net: net.params),
        (lambda net: merge.as_merged(net, TREE).merged, lambda net: slice(0, 2)),
    ],
)
def test_old_attributes(net, old, new):
    with pytest.warns(DeprecationWarning, match=r"is now \w+\.\w+;") as caught:
        found = old(net)
    assert found == new(net)
    assert caught[0].filename == __file__


def test_old_fields(net):
    layer = net.layer("a")
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    old = {"parameters" if name == "params" else name: value for name, value in fields.items()}
    with pytest.warns(DeprecationWarning, match=r"Layer\(parameters=...\) is now Layer") as caught:
        assert vfjax.Layer(**old) == layer
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"Layer\(parameters=...\) is now Layer"):
        changed = dataclasses.replace(layer, parameters=3)
    assert changed == dataclasses.replace(layer, params=3) != layer


def test_old_methods(net):
    moments = stats.moments(net, [TREE, TREE], [X], sites="taps", covariance=True)
    maps = align.Maps.of_permutations([None, {"a": np.arange(4)}])
    with pytest.warns(DeprecationWarning, match="is now vfjax.align.with_spreads") as caught:
        found = maps.with_spreads(net, moments)
    assert caught[0].filename == __file__
    assert found is align.with_spreads(maps, net, moments)


def test_old_keywords(net):
    part = slice(None, 1)
    with pytest.warns(DeprecationWarning, match=r"partial\(merged=...\) is now") as caught:
        model = merge.partial(net, [TREE, TREE], merged=part)
    assert model.span == merge.partial(net, [TREE, TREE], span=part).span == slice(0, 1)
    assert caught[0].filename == __file__
    pairs = [(X, jnp.zeros(2, jnp.int32))]
    for scores in (
        lambda **names: prune.magnitude(net, TREE, **names),
        lambda **names: prune.wanda(net, TREE, [X], **names),
        lambda **names: prune.fisher(net, TREE, pairs, **names),
        lambda **names: prune.woodfisher(net, TREE, pairs, count=2, **names),
        lambda **names: prune.inverse_fisher(net, TREE, pairs, count=2, **names).scores,
    ):
        with pytest.warns(DeprecationWarning, match=r"\(layers=...\) is now \w+\(names=...\)"):
            found = scores(layers=["b"])
        assert found.rows.keys() == scores(names=["b"]).rows.keys() == {"b"}
    with pytest.warns(DeprecationWarning, match="memory"):
        assert prune.memory(net, layers=["b"]) == prune.memory(net, names=["b"])
    with pytest.raises(TypeError, match="both span and merged"):
        merge.partial(net, [TREE, TREE], merged=part, span=part)
