"""Equations that hold jaxprs: calls, loops and branches, and whether layers lie inside them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax.extend import core as jex

from vfjax._jaxpr.contractions import is_linear
from vfjax._jaxpr.primitives import CAST, COND, CUSTOM, INLINE, SCAN, WHILE

PARAM, INPUT = 1, 2
"""Dependency bits: the value depends on the parameters, or on the network's input."""

# A third bit, used only here: the value depends on a leaf that a scan slices, one entry a step.
_STACKED = 4


def subjaxpr(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """The jaxpr that a call-like equation evaluates once, and its constants, or None.

    Args:
        eqn: A `JaxprEqn`.

    Returns:
        `(jaxpr, consts)` for `jit`, `remat`, `custom_jvp` and the like; None for loops and
        branches.
    """
    if eqn.primitive.name not in INLINE | CUSTOM:
        return None
    names = ("call_jaxpr", "jaxpr", "fun_jaxpr", "call")
    inner = next((eqn.params[name] for name in names if name in eqn.params), None)
    return None if inner is None else open_jaxpr(inner)


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Separates a (closed) jaxpr from its constants, in jax 0.10 and in 0.12."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()))


def scan_arity(params: Mapping[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan` equation."""
    if "num_carry" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # jax 0.12 keeps the user's pytrees here
    return len(list(consts)), len(list(carry))


def holds_layer(eqn: Any, depends: Sequence[int]) -> bool:
    """Whether a layer, a linear equation of parameters and input, lies inside at any depth.

    Args:
        eqn: A `JaxprEqn`.
        depends: Dependency bits of its operands.
    """
    return bool(_follow_bits(eqn, depends)[1])


def _follow_bits(eqn: Any, bits: Sequence[int]) -> tuple[list[int], int]:
    """Dependency bits of an equation's results, and of the kernels of all layers inside it."""
    name, params = eqn.primitive.name, eqn.params
    inner = subjaxpr(eqn)
    if inner is not None and len(inner[0].invars) == len(bits):
        return _bits_inside(inner[0], bits)
    if name == SCAN:
        consts, carry = scan_arity(params)
        body = open_jaxpr(params["jaxpr"])[0]
        return _fixed_point(body, bits, consts, carry)
    if name == WHILE:
        split, start = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        body, test = (open_jaxpr(params[k])[0] for k in ("body_jaxpr", "cond_jaxpr"))
        result, kernels = _fixed_point(body, bits[split:], start - split, len(bits) - start)
        (stops,), more = _bits_inside(test, [*bits[:split], *result])
        return [bit | stops for bit in result], kernels | more
    if name == COND:
        branches = [_bits_inside(open_jaxpr(b)[0], bits[1:]) for b in params["branches"]]
        columns = zip(*(result for result, _ in branches), strict=True)
        result = [union([*column, bits[0]]) for column in columns]
        return result, union(kernels for _, kernels in branches)
    if name in CAST:
        return list(bits), 0
    if is_linear(eqn):
        kernel, value = sorted(bits[:2], key=lambda b: b & INPUT)
        layer = value & INPUT and kernel & PARAM and not kernel & INPUT
        return [union(bits)], kernel if layer else 0
    # Any other equation that holds a jaxpr of as many operands (`shard_map`, `custom_vmap_call`)
    # is taken to call it.
    bodies = [open_jaxpr(p)[0] for p in params.values() if hasattr(open_jaxpr(p)[0], "eqns")]
    inside = [_bits_inside(b, bits)[1] for b in bodies if len(b.invars) == len(bits)]
    return [union(bits)] * len(eqn.outvars), union(inside)


def _bits_inside(jaxpr: Any, bits: Sequence[int]) -> tuple[list[int], int]:
    env = dict(zip(jaxpr.invars, bits, strict=True))

    def read(v: Any) -> int:
        return 0 if isinstance(v, jex.Literal) else env.get(v, 0)

    kernels = 0
    for eqn in jaxpr.eqns:
        result, more = _follow_bits(eqn, [read(v) for v in eqn.invars])
        env.update(zip(eqn.outvars, result, strict=True))
        kernels |= more
    return [read(v) for v in jaxpr.outvars], kernels


def _fixed_point(body: Any, bits: Sequence[int], start: int, count: int) -> tuple[list[int], int]:
    """Dependency bits after a loop whose carry is `bits[start:start + count]`."""
    bits = list(bits)
    while True:
        result, kernels = _bits_inside(body, bits)
        carry = [a | b for a, b in zip(bits[start : start + count], result[:count], strict=True)]
        if carry == bits[start : start + count]:
            return [*carry, *result[count:]], kernels
        bits[start : start + count] = carry


def union(bits: Iterable[int]) -> int:
    """The union of sets of dependency bits."""
    return functools.reduce(lambda a, b: a | b, bits, 0)


def scans_layers(eqn: Any, bits: Sequence[int]) -> bool:
    """Whether a scan steps over stacked layers, rather than over time or over examples."""
    first = sum(scan_arity(eqn.params))
    marked = [b | _STACKED if k >= first and b == PARAM else b for k, b in enumerate(bits)]
    return bool(_follow_bits(eqn, marked)[1] & _STACKED)
