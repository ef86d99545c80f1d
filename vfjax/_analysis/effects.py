"""How leaves act on features: they add to them, scale them, or act in other ways.

Permutations need not know this, since they permute all leaves along a group in the same way. Maps
that mix features do. A leaf that is added is mixed as the features are. A leaf that multiplies them
entry by entry would become a matrix, of which an entrywise product keeps only the diagonal. For a
leaf that acts through a root (a stored variance), or that is both read and written (a tied kernel),
no leaf of its shape does what the mixed features need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vfjax._analysis.norms import NormSite
from vfjax._jaxpr import INPUT, PARAM, Equation, Graph
from vfjax._jaxpr.primitives import ADDITIVE, DIV, LINEAR, MUL

ADDS, SCALES, KERNEL, JOINED, BENT = "adds", "scales", "kernel", "joined", "bent"
"""Added to features; multiplies them; in a linear layer; in a product of parameters; any other."""


class Effect(NamedTuple):
    """One way in which a leaf acts.

    Attributes:
        kind: One of the constants above.
        primitive: The primitive through which it acts.
        where: "file:line" of its equation.
    """

    kind: str
    primitive: str
    where: str


def leaf_effects(graph: Graph, norms: Iterable[NormSite]) -> dict[int, dict[str, Effect]]:
    """How each leaf acts on values that depend on the input.

    Args:
        graph: The graph.
        norms: Its normalisations with stored statistics. Maps leave their variances unknown, so
            variances have no effects, and the product of scale and root is not one either.

    Returns:
        By index of the leaf, its effects by kind: the first of each kind.
    """
    known = {}
    for norm in norms:
        for view, kind in ((norm.mean, ADDS), (norm.bias, ADDS), (norm.scale, SCALES)):
            if view is not None:
                known[view.leaf] = {kind: Effect(kind, "norm", graph.equations[norm.index].where)}
        known[norm.var.leaf] = {}
    effects: dict[int, dict[str, Effect]] = {k: {} for k in range(graph.num_leaves)}
    # For values made of parameters only: by leaf, None if it went in unchanged, or how it acts.
    held: dict[int, dict[int, Effect | None]] = {
        v: {k: None} for k, v in enumerate(graph.inputs[: graph.num_leaves])
    }
    for equation in graph.equations:
        for place, value in enumerate(equation.inputs):
            if not isinstance(value, int) or graph.depends[value] != PARAM:
                continue
            for leaf, before in held[value].items():
                if equation.depends & INPUT:
                    bent = before is not None and before.kind == BENT
                    for effect in (before, None if bent else _effect(equation, place)):
                        if effect is not None:
                            effects[leaf].setdefault(effect.kind, effect)
                    continue
                effect = before or _combined(graph, equation, place)
                for result in equation.results:
                    into = held.setdefault(result, {})
                    if effect is not None or leaf not in into:
                        into[leaf] = effect
    return effects | known


def _effect(equation: Equation, place: int) -> Effect:
    """How an operand that does not depend on the input acts on the others."""
    name = equation.primitive
    if name in LINEAR:
        kind = KERNEL
    elif name == MUL:
        kind = SCALES
    else:
        kind = ADDS if name in ADDITIVE else BENT
    return Effect(kind, name, equation.where)


def _combined(graph: Graph, equation: Equation, place: int) -> Effect | None:
    """How an operand acts among parameters; None if it is only added or scaled by numbers."""
    name = equation.primitive
    if name in ADDITIVE:
        return None
    others = [v for k, v in enumerate(equation.inputs) if k != place and isinstance(v, int)]
    numbers = not any(graph.depends[v] & PARAM and graph.avals[v].size > 1 for v in others)
    if name == MUL or (name == DIV and place == 0):
        return None if numbers else Effect(BENT, name, equation.where)
    if name in LINEAR:
        return None if numbers else Effect(JOINED, name, equation.where)
    return Effect(BENT, name, equation.where)


def obstacle(role: str, effects: Mapping[str, Effect]) -> str | None:
    """Why features cannot be mixed along an axis of a leaf, or None if they can.

    Args:
        role: Role of the axis, as in `vfjax.symmetry._places.Axis`.
        effects: The leaf's effects, by kind.
    """
    against = {
        "in": (BENT, ADDS, SCALES),
        "out": (BENT, SCALES),
        "elementwise": (BENT, JOINED, *((ADDS,) if effects.keys() & {SCALES, KERNEL} else ())),
    }[role]
    effect = next((effects[kind] for kind in against if kind in effects), None)
    if effect is None:
        return None
    acts = {
        BENT: "acts through",
        JOINED: "is multiplied by other parameters in",
        ADDS: "is also added to features by",
        SCALES: "also scales features by",
    }[effect.kind]
    return f"{acts} `{effect.primitive}` ({effect.where})"
