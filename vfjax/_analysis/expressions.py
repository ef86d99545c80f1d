"""What a value that depends on parameters only computes: a sum of products of powers.

Two values are the same function of the leaves if their terms are equal, however they were written:
`1 / sqrt(var + eps)` and `(var + eps) ** -0.5` are one product of one power. Layout does not count,
since all that is compared meets entry by entry. What the arithmetic does not cover stays whole, as
an `Opaque` value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from vfjax._analysis.views import Steps, step_of, view_of
from vfjax._jaxpr import INPUT, Graph
from vfjax._jaxpr.primitives import (
    ADD,
    BROADCAST,
    CAST,
    DIV,
    INTEGER_POW,
    LAYOUT,
    MAX,
    MUL,
    NEG,
    POW,
    RSQRT,
    SPREAD,
    SQRT,
    SQUARE,
    SUB,
)

# More terms than this are kept whole. A norm has three.
_MOST = 16


class Leaf(NamedTuple):
    """A leaf, or with a slot one entry of a stacked leaf."""

    leaf: int
    slot: int | None


class Opaque(NamedTuple):
    """A value that the arithmetic does not look into."""

    value: int


class Sum(NamedTuple):
    """Several terms, under a power."""

    terms: Terms


class Clamped(NamedTuple):
    """`maximum(terms, least)`."""

    terms: Terms
    least: float


Atom = Leaf | Opaque | Sum | Clamped
Product = frozenset[tuple[Atom, float]]
"""Powers of atoms, none of them 0."""

Terms = frozenset[tuple[Product, float]]
"""Coefficients of products, none of them 0."""

ONE: Product = frozenset()


class Unlike(Exception):
    """A leaf meets itself in another layout, or there are too many terms."""


@dataclasses.dataclass(frozen=True, eq=False)
class Expression:
    """A sum of products.

    Attributes:
        terms: The sum.
        steps: For each leaf in it, how its entries were laid out: the steps of a `View`.
    """

    terms: Terms
    steps: Mapping[Leaf, Steps] = dataclasses.field(default_factory=dict)

    @classmethod
    def of_number(cls, number: float) -> Expression:
        """A constant."""
        return cls(_terms({ONE: number}))

    def __add__(self, other: Expression) -> Expression:
        """The sum."""
        total = dict(self.terms)
        for product, coefficient in other.terms:
            total[product] = total.get(product, 0.0) + coefficient
        return Expression(_terms(total), _joined(self, other))

    def __mul__(self, other: Expression) -> Expression:
        """The product, multiplied out."""
        total: dict[Product, float] = {}
        for one, a in self.terms:
            for two, b in other.terms:
                product = times(one, two) if one and two else one or two
                total[product] = total.get(product, 0.0) + a * b
        return Expression(_terms(total), _joined(self, other))

    def __neg__(self) -> Expression:
        """The negative."""
        return self * Expression.of_number(-1.0)

    def power(self, exponent: float) -> Expression:
        """A power. Products under a root stay together: a root of a square is no linear term."""
        if len(self.terms) == 1:
            ((product, coefficient),) = self.terms
            alone = len(product) == 1 and coefficient == 1.0
            if alone or exponent == int(exponent) or (not product and coefficient > 0):
                raised = frozenset((atom, p * exponent) for atom, p in product)
                return Expression(_terms({raised: coefficient**exponent}), self.steps)
        return Expression(_terms({frozenset({(Sum(self.terms), exponent)}): 1.0}), self.steps)

    def clamped(self, least: float) -> Expression:
        """The larger of this and a number."""
        atom = Clamped(self.terms, least)
        return Expression(_terms({frozenset({(atom, 1.0)}): 1.0}), self.steps)

    def laid_out(self, step: Any) -> Expression:
        """The same entries in another layout."""
        steps = {leaf: (*before, step) for leaf, before in self.steps.items()}
        return Expression(self.terms, steps)


def times(one: Product, two: Product, exponent: float = 1.0) -> Product:
    """`one * two ** exponent`."""
    powers = dict(one)
    for atom, power in two:
        powers[atom] = powers.get(atom, 0.0) + exponent * power
    return frozenset((atom, power) for atom, power in powers.items() if power)


def _terms(total: Mapping[Product, float]) -> Terms:
    if len(total) > _MOST:
        raise Unlike
    return frozenset((product, value) for product, value in total.items() if value)


def _joined(one: Expression, two: Expression) -> Mapping[Leaf, Steps]:
    if any(one.steps[leaf] != steps for leaf, steps in two.steps.items() if leaf in one.steps):
        raise Unlike
    return {**one.steps, **two.steps}


class Expressions:
    """The expressions of a graph's values, each worked out once."""

    def __init__(self, graph: Graph) -> None:
        """Takes the graph."""
        self.graph = graph
        self._known: dict[int, Expression] = {}

    def of(self, value: Any) -> Expression:
        """The expression of a value that does not depend on the input, or of a literal."""
        known = self._known.get(value) if isinstance(value, int) else None
        if known is None:
            try:
                known = self._read(value)
            except (Unlike, OverflowError, ZeroDivisionError):
                known = self._opaque(value)
            if isinstance(value, int):
                self._known[value] = known
        return known

    def leaves_in(self, atom: Atom) -> frozenset[int]:
        """Indices of the leaves that an atom depends on."""
        if isinstance(atom, Leaf):
            return frozenset({atom.leaf})
        if isinstance(atom, Opaque):
            graph, value = self.graph, atom.value
            read = {v for i in graph.needed([value], ()) for v in graph.equations[i].values}
            inputs = enumerate(graph.inputs[: graph.num_leaves])
            return frozenset(k for k, v in inputs if v in read or v == value)
        return frozenset(k for inner, _ in powers(atom.terms) for k in self.leaves_in(inner))

    def _read(self, value: Any) -> Expression:
        graph = self.graph
        number = number_of(graph, value)
        if number is not None:
            return Expression.of_number(number)
        view = view_of(graph, value)
        if view is not None:
            leaf = Leaf(view.leaf, view.slot)
            return Expression(_terms({frozenset({(leaf, 1.0)}): 1.0}), {leaf: view.steps})
        if value not in graph.producer:
            return self._opaque(value)
        equation = graph.equations[graph.producer[value]]
        name, operands = equation.primitive, equation.inputs
        if name in CAST and len(operands) == 1:
            return self.of(operands[0])
        if name in LAYOUT or name == BROADCAST:
            return self.of(operands[0]).laid_out(step_of(graph, equation))
        if name in ADD:
            return self.of(operands[0]) + self.of(operands[1])
        if name == SUB:
            return self.of(operands[0]) + -self.of(operands[1])
        if name == NEG:
            return -self.of(operands[0])
        if name == MUL:
            return self.of(operands[0]) * self.of(operands[1])
        if name == DIV:
            return self.of(operands[0]) * self.of(operands[1]).power(-1)
        if name == MAX:
            for one, other in (operands, operands[::-1]):
                least = number_of(graph, other)
                if least is not None:
                    return self.of(one).clamped(least)
        exponent = {SQRT: 0.5, RSQRT: -0.5, SQUARE: 2.0}.get(name)
        if name == INTEGER_POW:
            exponent = equation.params["y"]
        elif name == POW:
            exponent = number_of(graph, operands[1])
        return self._opaque(value) if exponent is None else self.of(operands[0]).power(exponent)

    def _opaque(self, value: Any) -> Expression:
        return Expression(frozenset({(frozenset({(Opaque(value), 1.0)}), 1.0)}))


def powers(terms: Terms) -> Iterator[tuple[Atom, float]]:
    """All atoms of a sum, with their powers."""
    for product, _ in terms:
        yield from product


def leaves_of(terms: Terms, expressions: Expressions) -> frozenset[int]:
    """Indices of the leaves that a sum depends on."""
    return frozenset(k for atom, _ in powers(terms) for k in expressions.leaves_in(atom))


def number_of(graph: Graph, value: Any) -> float | None:
    """The number in a literal or a uniform constant, or None."""
    while True:
        if isinstance(value, jex.Literal) or value in graph.consts:
            given = value.val if isinstance(value, jex.Literal) else graph.consts[value]
            if not jnp.issubdtype(jnp.result_type(given), jnp.number):
                return None
            array = np.ravel(np.asarray(given))
            return float(array[0]) if array.size and (array == array[0]).all() else None
        if value not in graph.producer or graph.depends[value]:
            return None
        equation = graph.equations[graph.producer[value]]
        if equation.primitive not in SPREAD or equation.depends & INPUT:
            return None
        value = equation.inputs[0]


def evaluate_terms(terms: Terms, known: Callable[[Atom], Any]) -> Any:
    """The value of a sum.

    Args:
        terms: The sum.
        known: The value of a `Leaf` or an `Opaque`.
    """
    return sum(coefficient * evaluate_product(product, known) for product, coefficient in terms)


def evaluate_product(product: Product, known: Callable[[Atom], Any]) -> Any:
    """The value of a product of powers; arguments as for `evaluate_terms`."""
    result: Any = 1.0
    for atom, power in product:
        result = result * raised(evaluate_atom(atom, known), power)
    return result


def evaluate_atom(atom: Atom, known: Callable[[Atom], Any]) -> Any:
    """The value of an atom; arguments as for `evaluate_terms`."""
    if isinstance(atom, Sum):
        return evaluate_terms(atom.terms, known)
    if isinstance(atom, Clamped):
        inner = evaluate_terms(atom.terms, known)
        return _numpy(inner).maximum(inner, atom.least)
    return known(atom)


def raised(value: Any, power: float) -> Any:
    """A power, by a root where it is one."""
    if power == 1.0:
        return value
    return _numpy(value).sqrt(value) if power == 0.5 else value**power


def _numpy(value: Any) -> Any:
    """The library of an array, so that what is on the host stays there."""
    return jnp if isinstance(value, jax.Array) else np
