"""What leaves do to features: are they added to them, do they scale them, or act in other ways?

A permutation does not mind: all leaves along a group are permuted alike. A map that mixes features
does. What is added is mixed as they are; of what multiplies them entry by entry, the mixture is a
matrix, of which an entry by entry product keeps the diagonal; and for what acts through a root, as
a stored variance, or what is read and written at once, as a tied kernel, no leaf of its shape does
what the mixed features need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vfjax._analysis.norms import NormSite
from vfjax._jaxpr.calls import INPUT, PARAM
from vfjax._jaxpr.graph import Equation, Graph
from vfjax._jaxpr.primitives import ADDITIVE, DIV, LINEAR, MUL

ADDS, SCALES, KERNEL, JOINED, BENT = "adds", "scales", "kernel", "joined", "bent"
"""Added to features; multiplies them; in a linear layer; in a product of parameters; all else."""


class Effect(NamedTuple):
    """One way in which a leaf acts.

    Attributes:
        kind: One of the constants above.
        primitive: By which primitive.
        where: "file:line" of its equation.
    """

    kind: str
    primitive: str
    where: str


def leaf_effects(graph: Graph, norms: Iterable[NormSite]) -> dict[int, dict[str, Effect]]:
    """How every leaf acts on what depends on the input.

    Args:
        graph: The graph.
        norms: Its normalisations with stored statistics. Maps leave their variances unknown, so
            these count for nothing, nor does that scale and root are multiplied.

    Returns:
        By the index of a leaf, its effects by kind, the first of each.
    """
    known = {}
    for norm in norms:
        for view, kind in ((norm.mean, ADDS), (norm.bias, ADDS), (norm.scale, SCALES)):
            if view is not None:
                known[view.leaf] = {kind: Effect(kind, "norm", graph.equations[norm.index].where)}
        known[norm.var.leaf] = {}
    found: dict[int, dict[str, Effect]] = {k: {} for k in range(graph.num_leaves)}
    # Of values made of parameters alone: by leaf, whether it went in as it is, or how else.
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
                            found[leaf].setdefault(effect.kind, effect)
                    continue
                effect = before or _combined(graph, equation, place)
                for result in equation.results:
                    into = held.setdefault(result, {})
                    if effect is not None or leaf not in into:
                        into[leaf] = effect
    return found | known


def _effect(equation: Equation, place: int) -> Effect:
    """What an operand without input does to the others."""
    name = equation.primitive
    if name in LINEAR:
        kind = KERNEL
    elif name == MUL:
        kind = SCALES
    else:
        kind = ADDS if name in ADDITIVE else BENT
    return Effect(kind, name, equation.where)


def _combined(graph: Graph, equation: Equation, place: int) -> Effect | None:
    """What becomes of an operand among parameters: None if it goes in as it is."""
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


def obstacle(role: str, found: Mapping[str, Effect]) -> str | None:
    """Why features cannot be mixed along an axis of a leaf, or None if they can.

    Args:
        role: Role of the axis, as in `vfjax.symmetry._places.Axis`.
        found: The leaf's effects.
    """
    against = {
        "in": (BENT, ADDS, SCALES),
        "out": (BENT, SCALES),
        "elementwise": (BENT, JOINED, *((ADDS,) if found.keys() & {SCALES, KERNEL} else ())),
    }[role]
    effect = next((found[kind] for kind in against if kind in found), None)
    if effect is None:
        return None
    acts = {
        BENT: "acts through",
        JOINED: "is multiplied by other parameters in",
        ADDS: "is also added to features by",
        SCALES: "also scales features by",
    }[effect.kind]
    return f"{acts} `{effect.primitive}` ({effect.where})"
