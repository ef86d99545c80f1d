"""Normalisations with stored statistics: `(x - mean) / sqrt(var + eps) * scale + bias`.

A normalisation is an affine map of an activation, `x -> a * x + c`, with `a` and `c` made of
leaves. It is matched by what it computes: `a = scale * deviation ** -1`, where the deviation is a
root of a variance, or a stored standard deviation, and `c = bias - mean * a`. Leaves may be
multiplied by scalars, as where running averages are debiased: `mean / (1 - momentum ** count)`.
An `a` that is a plain leaf is no normalisation: nothing tells what the leaf should be.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vfjax._analysis.expressions import (
    ONE,
    Atom,
    Clamped,
    Expression,
    Expressions,
    Leaf,
    Opaque,
    Product,
    Sum,
    Terms,
    Unlike,
    evaluate_atom,
    evaluate_product,
    evaluate_terms,
    leaves_of,
    powers,
    raised,
    times,
)
from vfjax._analysis.views import View, known
from vfjax._jaxpr import INPUT, PARAM, Equation, Graph
from vfjax._jaxpr.primitives import ADD, BROADCAST, CAST, DIV, MUL, NEG, PRODUCTS, SUB, SUMS


@dataclasses.dataclass(frozen=True, eq=False)
class Deviation:
    """What a normalisation divides by, as a function of its leaf.

    Attributes:
        atom: What is raised to `power`; it holds the leaf, and whatever is added to it.
        power: The power, such as 1/2 for the root of a variance and what is added to it.
        leaf: The leaf.
        factor: Scalars that multiply it, and their coefficient.
        outer: The power of `factor * leaf` in the deviation: 1/2 for a variance, 1 for a standard
            deviation.
    """

    atom: Atom
    power: float
    leaf: Leaf
    factor: tuple[Product, float]
    outer: float

    @property
    def of_variance(self) -> bool:
        """Whether the leaf holds variances, not standard deviations."""
        return self.outer == 0.5

    def ratio(self, old: Any, new: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The deviation at a leaf over that at another value of this leaf."""
        return raised(self._atom(old, scalar) / self._atom(new, scalar), self.power)

    def at(self, leaf: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The deviation at a leaf."""
        return raised(self._atom(leaf, scalar), self.power)

    def _atom(self, leaf: Any, scalar: Callable[[Atom], Any]) -> Any:
        return evaluate_atom(self.atom, lambda a: leaf if a == self.leaf else scalar(a))

    def leaf_at(self, deviation: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The leaf at which the deviation is what is given."""
        atom, value = self.atom, raised(deviation, 1 / self.power)
        while isinstance(atom, (Sum, Clamped)):
            ((mine, coefficient),) = [(p, k) for p, k in atom.terms if _holds(p, self.leaf)]
            rest = atom.terms - {(mine, coefficient)}
            value = (value - evaluate_terms(rest, scalar)) / coefficient
            ((atom, power),) = [(a, n) for a, n in mine if _holds(frozenset({(a, n)}), self.leaf)]
            others = times(mine, frozenset({(atom, power)}), -1)
            value = raised(value / evaluate_product(others, scalar) if others else value, 1 / power)
        return value

    def variance(self, leaf: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The variance that a leaf stands for, without what is added to it."""
        return raised(_scaled(leaf, self.factor, scalar), 2 * self.outer)

    def leaf_for(self, variance: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The leaf that stands for a variance."""
        return _scaled(raised(variance, 0.5 / self.outer), self.factor, scalar, -1)


def _scaled(
    value: Any, factor: tuple[Product, float], scalar: Callable[[Atom], Any], power: int = 1
) -> Any:
    """A value times scalars, or divided by them."""
    if factor == (ONE, 1.0):
        return value
    product, coefficient = factor
    return value * raised(coefficient * evaluate_product(product, scalar), power)


def _holds(product: Product, leaf: Leaf) -> bool:
    """Whether a leaf is among the atoms of a product, or within one."""
    return any(
        atom == leaf
        or (isinstance(atom, (Sum, Clamped)) and any(_holds(p, leaf) for p, _ in atom.terms))
        for atom, _ in product
    )


@dataclasses.dataclass(frozen=True, eq=False)
class NormSite:
    """A normalisation by stored statistics.

    Attributes:
        equations: Indices of its equations that depend on the input, in order.
        operand: Which operand of the first of them is the norm's input.
        input: Id of the norm's input.
        mean: The leaf of means.
        mean_factor: Scalars that multiply it, and their coefficient.
        var: The leaf of variances, or of standard deviations.
        deviation: How the norm divides by it.
        scale: The leaf of scales, or None.
        bias: The leaf of shifts, or None.
        eps: The number added to the variance, or to the standard deviation.
        channel_axes: Axes of the norm's input that the statistics vary along.
        order: For each channel, row-major along these axes, its entry in the leaves.
    """

    equations: tuple[int, ...]
    operand: int
    input: int
    mean: View
    mean_factor: tuple[Product, float]
    var: View
    deviation: Deviation
    scale: View | None
    bias: View | None
    eps: float
    channel_axes: tuple[int, ...]
    order: np.ndarray

    @property
    def index(self) -> int:
        """Index of the first equation, which reads the norm's input."""
        return self.equations[0]

    def mean_of(self, leaf: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The mean that the leaf stands for."""
        return _scaled(leaf, self.mean_factor, scalar)

    def leaf_for(self, mean: Any, scalar: Callable[[Atom], Any]) -> Any:
        """The leaf that stands for a mean, or what is added to it for a shift."""
        return _scaled(mean, self.mean_factor, scalar, -1)


class _Affine(NamedTuple):
    """`a * x + c`."""

    a: Expression
    c: Expression


def norm_sites(graph: Graph, expressions: Expressions) -> list[NormSite]:
    """The normalisations with stored statistics of a graph, in the order of their equations."""
    sites: list[NormSite] = []
    taken: set[int] = set()
    # From the back: a norm begins as late as it can, after whatever else is added and multiplied.
    for index in reversed(range(len(graph.equations))):
        site = None if index in taken else _site(graph, expressions, index, taken)
        if site is not None:
            sites.append(site)
            taken.update(site.equations)
    return sites[::-1]


def _site(
    graph: Graph, expressions: Expressions, start: int, taken: Iterable[int]
) -> NormSite | None:
    """The norm that begins at an equation, if one does."""
    equation = graph.equations[start]
    operand = _operand(graph, equation) if equation.primitive in SUMS | PRODUCTS else None
    if operand is None:
        return None
    other = equation.inputs[1 - operand]
    if not isinstance(other, int) or graph.depends[other] != PARAM:
        return None
    value = equation.values[0] if operand == 0 else equation.values[-1]
    chain: list[int] = []
    best, most = None, -1
    for index, map_ in _steps(graph, expressions, start, operand, taken):
        chain.append(index)
        found = _match(expressions, map_)
        if found is None:
            continue
        known = sum(found[part] is not None for part in ("scale", "bias"))
        if known > most:
            best, most = (tuple(chain), found), known
    if best is None:
        return None
    shape = graph.avals[value].shape
    mean, var = (_placed(graph, best[1][part], shape) for part in ("mean", "var"))
    if mean is None or var is None or mean[0] != var[0] or not np.array_equal(mean[1], var[1]):
        return None
    return NormSite(best[0], operand, value, **best[1], channel_axes=mean[0], order=mean[1])


def _operand(graph: Graph, equation: Equation) -> int | None:
    """Which operand of an elementwise equation depends on the input, if exactly one does."""
    if not equation.depends & INPUT or len(equation.outputs) != 1:
        return None
    depends = graph.depends
    of_input = [
        k for k, v in enumerate(equation.inputs) if isinstance(v, int) and depends[v] & INPUT
    ]
    if len(of_input) != 1:
        return None
    value = equation.inputs[of_input[0]]
    assert isinstance(value, int)
    same = graph.avals[value].shape == graph.avals[equation.result].shape
    return of_input[0] if same and jnp.issubdtype(graph.avals[value].dtype, jnp.inexact) else None


def _steps(
    graph: Graph, expressions: Expressions, start: int, operand: int | None, taken: Iterable[int]
) -> Iterator[tuple[int, _Affine]]:
    """Follows an activation through equations that keep it an affine map of the first operand.

    Yields:
        The index of each equation, and the map up to it.
    """
    index, map_ = start, _Affine(Expression.of_number(1.0), Expression.of_number(0.0))
    while operand is not None and index not in taken:
        equation = graph.equations[index]
        try:
            new = _after(expressions, equation, operand, map_)
        except (Unlike, OverflowError, ZeroDivisionError):
            return
        if new is None:
            return
        map_ = new
        yield index, map_
        value = equation.result
        users = graph.users.get(value, ())
        if len(users) != 1 or value in graph.output_ids:
            return
        index = users[0]
        operand = _operand(graph, graph.equations[index])


def _after(
    expressions: Expressions, equation: Equation, operand: int, map_: _Affine
) -> _Affine | None:
    """The map after one more equation, or None if that is not affine."""
    name, (a, c) = equation.primitive, map_
    if name in CAST:
        return map_
    if name == NEG:
        return _Affine(-a, -c)
    if name not in SUMS | PRODUCTS or (name == DIV and operand == 1):
        return None
    other = expressions.of(equation.inputs[1 - operand])
    if name in ADD:
        return _Affine(a, c + other)
    if name == SUB:
        return _Affine(a, c + -other) if operand == 0 else _Affine(-a, other + -c)
    other = other if name == MUL else other.power(-1)
    return _Affine(a * other, c * other)


def _match(expressions: Expressions, map_: _Affine) -> dict[str, Any] | None:
    """What a `NormSite` does to its input, if a map is a normalisation."""
    if not all(any(power < 0 for _, power in powers(part.terms)) for part in map_):
        return None  # nothing divides both; most maps end here
    for deviation, gain in _divisors(expressions, map_.a):
        for mean, factor, rest in _means(expressions, map_):
            var = deviation.leaf
            if not _alike(expressions.graph, mean, var):
                continue
            elsewhere = leaves_of(gain.terms, expressions) | leaves_of(rest.terms, expressions)
            if elsewhere & {mean.leaf, var.leaf}:
                continue
            views = [View(k.leaf, k.slot, e.steps[k]) for e, k in ((map_.c, mean), (map_.a, var))]
            return {
                "mean": views[0],
                "mean_factor": factor,
                "var": views[1],
                "deviation": deviation,
                "scale": _sole_leaf(expressions, gain, exact=False),
                "bias": _sole_leaf(expressions, rest, exact=True),
                "eps": _added(deviation.atom),
            }
    return None


def _divisors(expressions: Expressions, a: Expression) -> Iterator[tuple[Deviation, Expression]]:
    """The deviations that all of `a` is divided by, each with what else multiplies."""
    shortest = min((product for product, _ in a.terms), key=len, default=ONE)
    # Roots first: beside one, a plain division is a temperature or the like.
    for atom, power in sorted(shortest, key=lambda factor: -factor[1]):
        if power >= 0:
            continue
        divided = frozenset((times(p, frozenset({(atom, power)}), -1), k) for p, k in a.terms)
        everywhere = all((atom, power) in product for product, _ in a.terms)
        flipped = len(a.terms) == 1 and next(iter(a.terms))[1] < 0
        if not everywhere or flipped:
            continue
        for leaf, factor, inner in _inside(expressions, atom):
            outer = inner * -power
            if outer in (0.5, 1.0):
                deviation = Deviation(atom, -power, leaf, factor, outer)
                yield deviation, Expression(divided, a.steps)


def _inside(
    expressions: Expressions, atom: Atom
) -> Iterator[tuple[Leaf, tuple[Product, float], float]]:
    """The leaves that an atom may be made of, each with its factor and its power with that."""
    if isinstance(atom, Leaf):
        yield atom, (ONE, 1.0), 1.0
    if not isinstance(atom, (Sum, Clamped)):
        return
    vectors = [(p, k) for p, k in atom.terms if _vectors(expressions, p)]
    # Of one channel, any term may hold the statistic; what is alike the mean decides.
    candidates = vectors or [(p, k) for p, k in atom.terms if p]
    for product, coefficient in candidates if len(vectors) < 2 else ():
        for inner, power in product:
            others = times(product, frozenset({(inner, power)}), -1)
            if power <= 0 or coefficient <= 0 or _vectors(expressions, others):
                continue
            for leaf, (scalars, number), outer in _inside(expressions, inner):
                if sum(_holds(p, leaf) for p, _ in atom.terms) == 1:
                    # (scalars * leaf) ** outer, raised and multiplied once more.
                    total = outer * power
                    scaled = times(scalars, others, 1 / total), number * coefficient ** (1 / total)
                    yield leaf, scaled, total


def _means(
    expressions: Expressions, map_: _Affine
) -> Iterator[tuple[Leaf, tuple[Product, float], Expression]]:
    """Leaves m with `c = rest - factor * m * a`, and what is left of c."""
    (a, c) = map_
    inside = leaves_of(a.terms, expressions)
    for leaf in dict.fromkeys(atom for atom, _ in powers(c.terms) if isinstance(atom, Leaf)):
        if leaf.leaf in inside:
            continue
        alone = frozenset({(leaf, 1.0)})
        mine = {(times(p, alone, -1), k) for p, k in c.terms if (leaf, 1.0) in p}
        rest = Expression(frozenset(t for t in c.terms if (leaf, 1.0) not in t[0]), c.steps)
        first, one = next(iter(a.terms))
        for product, k in mine:
            factor = times(product, first, -1), -k / one
            if factor[1] > 0 and not (_vectors(expressions, factor[0])):
                scaled = {(times(p, factor[0]), -n * factor[1]) for p, n in a.terms}
                if _close(scaled, mine):
                    yield leaf, factor, rest


def _close(one: Iterable[tuple[Product, float]], two: Iterable[tuple[Product, float]]) -> bool:
    """Whether two sums have the same products, with the same coefficients up to rounding."""
    a, b = dict(one), dict(two)
    return a.keys() == b.keys() and all(abs(a[p] - b[p]) <= 1e-6 * abs(b[p]) for p in a)


def _vectors(expressions: Expressions, product: Product) -> bool:
    """Whether a product depends on more than scalars."""
    graph = expressions.graph
    return any(
        _is_array(graph, atom)
        or any(graph.avals[graph.inputs[k]].size > 1 for k in expressions.leaves_in(atom))
        for atom, _ in product
    )


def _is_array(graph: Graph, atom: Atom) -> bool:
    """Whether an atom is an array of numbers that differ."""
    if not isinstance(atom, Opaque):
        return False
    return not graph.depends[atom.value] and graph.avals[atom.value].size > 1


def _alike(graph: Graph, a: Leaf, b: Leaf) -> bool:
    """Whether two leaves may be mean and variance of one norm: they are alike, but not one."""
    one, two = (graph.avals[graph.inputs[k.leaf]].shape[k.slot is not None :] for k in (a, b))
    # Of one channel, a statistic and a scalar such as a counter differ in shape only.
    same = one == two or math.prod(one) == math.prod(two) > 1
    return same and a.slot == b.slot and a.leaf != b.leaf


def _placed(
    graph: Graph, view: View, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], np.ndarray] | None:
    """The axes of a value that a leaf varies along, and the leaf's entry at each place there.

    None unless each entry serves one channel.
    """
    leaf = graph.avals[graph.inputs[view.leaf]].shape[view.slot is not None :]
    size = int(np.prod(leaf))
    index = view.forward(np.arange(size).reshape(leaf))
    if index.ndim not in (0, len(shape)):
        return None
    shape = known(shape)
    index = np.broadcast_to(index, shape)
    axes = tuple(k for k, n in enumerate(shape) if n > 1 and index.strides[k])
    first = tuple(slice(None) if k in axes else 0 for k in range(len(shape)))
    order = index[first].reshape(-1)
    if order.size != size:
        return None
    return (axes, order) if (np.bincount(order, minlength=size) == 1).all() else None


def _sole_leaf(expressions: Expressions, part: Expression, *, exact: bool) -> View | None:
    """The leaf that an expression consists of, up to scalars unless `exact`; else None."""
    if len(part.terms) != 1:
        return None
    ((product, coefficient),) = part.terms
    leaves = [
        (atom, power)
        for atom, power in product
        if exact or _vectors(expressions, frozenset({(atom, 1.0)}))
    ]
    if not exact and len(product) == 1:
        leaves = list(product)  # a norm of one channel
    if len(leaves) != 1 or (exact and coefficient != 1.0):
        return None
    ((atom, power),) = leaves
    if not isinstance(atom, Leaf) or power != 1.0:
        return None
    return View(atom.leaf, atom.slot, part.steps[atom])


def _added(atom: Atom) -> float:
    """The number that is added in a deviation: the outermost one."""
    if not isinstance(atom, (Sum, Clamped)):
        return 0.0
    number = dict(atom.terms).get(ONE)
    if number is not None:
        return number
    inner = (_added(inner) for inner, _ in powers(atom.terms))
    return next((number for number in inner if number), 0.0)


# --------------------------------------------------------------------------- what is not recognised


def unrecognised(
    graph: Graph, expressions: Expressions, norms: Iterable[NormSite]
) -> list[tuple[int, str, str]]:
    """Leaves that act on activations as statistics do, outside of any norm that is known.

    These are leaves of several entries that, entry by entry, an activation is divided by or that
    are subtracted from one. Alone, a leaf that is subtracted is a bias with another sign, and one
    that divides is a temperature: it counts if it acts through a root, if another leaf divides it,
    or if leaves are also added or multiplied just before or after. An activation that was itself
    spread, as where distances to prototypes are computed, does not count.

    Returns:
        `(index of the leaf, "subtracts from" or "divides", file:line)`, each leaf once.
    """
    taken = {index for norm in norms for index in norm.equations}
    found: dict[int, tuple[str, str]] = {}
    for index, equation in enumerate(graph.equations):
        if index in taken or equation.primitive not in SUMS | PRODUCTS:
            continue
        operand = _operand(graph, equation)
        other = None if operand is None else equation.inputs[1 - operand]
        if not isinstance(other, int) or graph.depends[other] != PARAM:
            continue
        if _is_spread(graph, equation.inputs[operand or 0]):
            continue
        name, terms = equation.primitive, expressions.of(other).terms
        if operand == 1 and name in (SUB, DIV):
            continue
        beside = _beside(graph, index)
        if name in PRODUCTS:
            leaves = set(_dividing(expressions, terms, -1 if name == DIV else 1, beside))
        else:
            sign = -1 if name in ADD else 1
            down = (p for p, k in terms if sign * k > 0 and (beside or any(n < 0 for _, n in p)))
            leaves = {a.leaf for p in down for a, n in p if isinstance(a, Leaf) and n > 0}
        verb = "divides" if name in PRODUCTS else "subtracts from"
        for leaf in sorted(leaves):
            if graph.avals[graph.inputs[leaf]].size > 1:
                found.setdefault(leaf, (verb, equation.where))
    return [(leaf, *what) for leaf, what in found.items()]


def _dividing(expressions: Expressions, terms: Terms, sign: float, rooted: bool) -> Iterator[int]:
    """Leaves under a negative power in a sum, whose own power is `sign`, and under a root."""
    for atom, power in powers(terms):
        root = rooted or power != int(power)
        if power * sign < 0 and root:
            yield from expressions.leaves_in(atom)
        elif isinstance(atom, (Sum, Clamped)):
            yield from _dividing(expressions, atom.terms, sign * power, root)


def _beside(graph: Graph, index: int) -> bool:
    """Whether leaves are also added or multiplied just before or after an equation."""
    near, seen = [index], set()
    while near:
        k = near.pop()
        equation = graph.equations[k]
        if k in seen or _operand(graph, equation) is None:
            continue
        seen.add(k)
        if k != index and equation.primitive in SUMS | PRODUCTS:
            if any(graph.depends[v] == PARAM for v in equation.values):
                return True
        elif k == index or equation.primitive in CAST:
            near += graph.users.get(equation.result, ())
            near += [graph.producer[v] for v in equation.values if v in graph.producer]
    return False


def _is_spread(graph: Graph, value: Any) -> bool:
    """Whether a value repeats another along some axis."""
    while value in graph.producer:
        equation = graph.equations[graph.producer[value]]
        if equation.primitive == BROADCAST:
            source = equation.values[0]
            if graph.avals[source].size != graph.avals[value].size:
                return True
        elif equation.primitive not in CAST:
            return False
        value = equation.inputs[0]
    return False
