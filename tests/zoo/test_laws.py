"""The laws of every network in the zoo; one that does not hold has a reason in the registry."""

from __future__ import annotations

import functools

import jax
import pytest

from zoo import attention, convolutional, others
from zoo.laws import LAWS, Case
from zoo.registry import ZOO

# Of leaves that nothing reads, and of what cannot be matched: laws are about what can.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

assert attention and convolutional and others  # they fill the registry
COUNT = 24


@functools.cache
def case(name):
    of = ZOO[name]
    return Case(of.fn, of.variables(0), of.variables(1), of.x(COUNT))


CASES = [
    pytest.param(name, law, id=f"{name}-{law.__name__}", marks=[pytest.mark.slow] * slow)
    for name, of in ZOO.items()
    for law in LAWS
    for slow in [law.__name__ in of.slow]
]


@pytest.mark.parametrize(("name", "law"), CASES)
def test_law(name, law):
    reason = ZOO[name].fails.get(law.__name__)
    with jax.numpy_rank_promotion("allow"):
        if reason is None:
            law(case(name))
            return
        with pytest.raises(Exception):  # noqa: B017 - whatever it is, it does not hold
            law(case(name))


def test_reasons_are_of_laws():
    names = {law.__name__ for law in LAWS}
    assert all(of.fails.keys() <= names for of in ZOO.values())
