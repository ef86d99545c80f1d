"""Laws of published networks, as far as their packages are installed; `pytest -m zoo`."""

from __future__ import annotations

import functools

import jax
import pytest

from vfjax import align, merge
from zoo import laws
from zoo.published import FAILS, PUBLISHED, built, noisy

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the packages, in every version of them
]


def activations(case):
    """Units of a copy correlate with each other as they do with themselves; some may be dead."""
    net, a, _, copy, x = case.parts
    found, own = (align.match_activations(net, a, tree, [x]) for tree in (copy, a))
    assert found.objective[-1] == pytest.approx(own.objective[-1], rel=1e-5)


def limits(case):
    """Without a head, what follows the last layer is a norm; an ensemble averages before it."""
    net, a, b, _, x = case.parts
    whole = merge.preserve_first(net, [a, b], layers=0)
    laws.close(whole(x), net.run(merge.interpolate([a, b]), x))
    laws.close(merge.ensemble(net, [a, a])(x), net.run(a, x))


LAWS = (laws.trace, laws.spec, laws.weights, activations, limits, laws.itself)
LAWS += (laws.repair, laws.masks, laws.report)


@functools.cache
def case(name):
    try:
        fn, a, x = built(name)
    except ImportError as error:
        return str(error)
    return laws.Case(fn, a, noisy(a, 1), x)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", PUBLISHED)
def test_law(name, law):
    of = case(name)
    if isinstance(of, str):
        pytest.skip(of)
    with jax.numpy_rank_promotion("allow"):
        if (name, law.__name__) not in FAILS:
            law(of)
            return
        with pytest.raises(Exception):  # noqa: B017 - whatever it is, it does not hold
            law(of)
