"""The table of primitives: it holds what jax offers, says what is true, and stands alone."""

from __future__ import annotations

import ast
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jex
from jax.sharding import NamedSharding, PartitionSpec

import vfjax
from vfjax._jaxpr import primitives
from vfjax._jaxpr.primitives import CAST, ELEMENTWISE, INLINE, SPREAD, TABLE, Kind, Linear
from vfjax._propagate import RULES

# Of a table for two versions of jax, what one of them lacks.
ONLY_0_10 = {"closed_call"}
ONLY_0_12 = {"log2", "one_minus_square", "polynomial", "relayout"}

X = np.array([0.45, 0.8, 0.3, 0.6], np.float32)  # in neither order, so that no scan is the identity
Y = np.array([0.3, 0.2, 0.9, 0.55], np.float32)
M = np.stack([X, Y, X * Y])


def mesh():
    return NamedSharding(jax.make_mesh((1,), ("d",)), PartitionSpec())


def along(name, axes):
    function = getattr(lax, name)
    return lambda x: function(x, axes)


def pool(x):
    return lax.reduce_window(x, -np.inf, lax.max, (2,), (2,), "VALID")


# A use of each primitive that its name does not lead to a function of `jax.lax`.
USES = {
    "add_any": (lambda x: jax.vjp(lambda a: (a, a), x)[1]((x, 2 * x))[0], X),
    "copy": (jnp.copy, X),
    "device_put": (jax.device_put, X),
    "name": (lambda x: checkpoint_name(x, "x"), X),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 23), X),
    "convert_element_type": (lambda x: lax.convert_element_type(x, jnp.float16), X),
    "sharding_constraint": (lambda x: lax.with_sharding_constraint(x, mesh()), X),
    "reshape": (lambda x: lax.reshape(x, (2, 2)), X),
    "squeeze": (lambda x: lax.squeeze(x, (0,)), X[None]),
    "transpose": (lambda x: lax.transpose(x, (1, 0)), M),
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 4), (1,)), X),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), X),
    "select_n": (lax.select_n, X > 0.5, X, Y),
    "concatenate": (lambda x, y: lax.concatenate([x, y], 0), X, Y),
    "pad": (lambda x, y: lax.pad(x, y, ((1, 2, 0),)), X, Y[0]),
    "rev": (lambda x: lax.rev(x, (0,)), X),
    "slice": (lambda x: lax.slice(x, (1,), (3,)), X),
    "split": (lambda x: lax.split(x, (1, 3)), X),
    "stack": (lambda x, y: jnp.stack([x, y]), X, Y),
    "tile": (lambda x: lax.tile(x, (2,)), X),
    "unstack": (lambda x: lax.unstack(x), X),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i,), (2,)), X, 1),
    "dynamic_update_slice": (lambda x, y, i: lax.dynamic_update_slice(x, y, (i,)), X, Y[:2], 1),
    "gather": (lambda x, i: x.at[i].get(mode="clip"), X, np.array([2, 0])),
    "scatter": (lambda x, i, y: x.at[i].set(y, mode="clip"), X, 2, Y[0]),
    "scatter-add": (lambda x, i, y: x.at[i].add(y, mode="clip"), X, 2, Y[0]),
    "scatter-sub": (lambda x, i, y: x.at[i].subtract(y, mode="clip"), X, 2, Y[0]),
    **{
        f"scatter-{n}": (
            lambda x, i, y, n=n: getattr(x.at[i], n)(y, mode="clip"),
            X,
            np.arange(4),
            Y,
        )
        for n in ("mul", "max", "min")
    },
    "dot_general": (lax.dot, M, X),
    "ragged_dot_general": (lax.ragged_dot, M, np.stack([M.T, M.T**2]), np.array([2, 1])),
    "triangular_solve": (
        lambda a, b: lax.linalg.triangular_solve(a, b, left_side=True, lower=True),
        M[:, :3],
        M,
    ),
    "fft": (lambda x: jnp.fft.fft(x).real, X),
    "select_and_scatter_add": (lambda y, x: jax.vjp(pool, x)[1](y)[0], Y[:2], X),
    "select_and_gather_add": (lambda y, x: jax.jvp(pool, (x,), (y,))[1], Y, X),
    "conv_general_dilated": (lambda x, y: lax.conv(x, y, (1,), "SAME"), M[None], M[:2, :3, None]),
    "reduce_window_sum": (lambda x: lax.reduce_window(x, 0.0, lax.add, (2,), (1,), "SAME"), X),
    "reduce_window_max": (lambda x: lax.reduce_window(x, -np.inf, lax.max, (2,), (1,), "SAME"), X),
    "reduce_window_min": (lambda x: lax.reduce_window(x, np.inf, lax.min, (2,), (1,), "SAME"), X),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    **{f"reduce_{n}": (along(f"reduce_{n}", (0,)), X) for n in ("sum", "max", "min", "prod")},
    **{name: (along(name, 0), X) for name in sorted(primitives.CUMULATIVE)},
}


def names_of(fn, *operands):
    """Primitives that a function is made of, calls looked into."""

    def inside(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in INLINE:
                yield from inside(eqn.params["jaxpr"].jaxpr)
            else:
                yield eqn.primitive.name

    return list(inside(jax.make_jaxpr(fn)(*operands).jaxpr))


def elementwise_functions():
    """Functions of `jax.lax` that are one primitive and map position to position, by its name."""
    entries = {
        "f": X,
        "i": np.array([2, 3, 1, 4], np.int32),
        "b": np.array([True, False, False, True]),
        "c": X + 1j * Y[::-1],
    }
    signatures = ["f", "i", "b", "c", "ff", "ii", "bb", "cc", "fff", "iii", "bff"]
    found = {}
    for fn in {id(f): f for n, f in sorted(vars(lax).items()) if n[0] != "_"}.values():
        for signature in () if isinstance(fn, type) or not callable(fn) else signatures:
            operands = [jnp.asarray(entries[k]) for k in signature]
            try:
                shapes = [out.shape for out in jax.tree.leaves(jax.eval_shape(fn, *operands))]
                names = names_of(fn, *operands) if shapes == [(4,)] else ()
                if len(names) != 1 or names[0] in found:
                    continue
                whole = fn(*operands)
                singles = [fn(*(a[k : k + 1] for a in operands)) for k in range(4)]
            except Exception:  # not a function of so many arrays, or not of these types
                continue
            # Vectors may be rounded otherwise than what is left over of them.
            if np.allclose(whole, np.concatenate(singles), equal_nan=True):
                found[names[0]] = fn, signature
                break
    return found


@pytest.fixture(scope="module")
def functions():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return elementwise_functions()


def test_every_name_is_a_primitive_of_jax():
    known = {
        value.name
        for name, module in list(sys.modules.items())
        if name.startswith("jax")
        for value in list(vars(module).values())
        if isinstance(value, jex.Primitive)
    }
    assert TABLE.keys() - known <= ONLY_0_10 | ONLY_0_12


def test_the_table_holds_what_jax_offers_elementwise(functions):
    assert len(functions) > 75
    assert not functions.keys() - ELEMENTWISE
    hidden = {"add_any", "eq_to", "le_to", "lt_to", "polynomial", "pvary", "zeros_like"}
    placing = {"layout_constraint", "relayout", "reshard", "with_memory_space_constraint"}
    assert ELEMENTWISE - functions.keys() - USES.keys() <= hidden | placing | ONLY_0_12


def test_every_primitive_of_the_table_has_a_rule():
    assert TABLE.keys() == RULES.keys()


@pytest.mark.parametrize("name", [n for n in USES if n in SPREAD])
def test_what_spreads_keeps_the_entries(name):
    fn, x = USES[name]
    assert name in names_of(fn, x)
    after = np.unique(np.asarray(fn(x), np.float32))
    np.testing.assert_allclose(after, np.unique(x), rtol=1e-3)
    assert name not in CAST or fn(x).shape == x.shape


def affine_in(linear, operands):
    """Sets of operands in which a primitive says that it is affine, jointly."""
    floats = floats_of(operands)
    return {
        Linear.JOINTLY: [floats],
        Linear.EACH: [[k] for k in floats],
        Linear.FIRST: [floats[:1]],
        Linear.FIRST_TWO: [[k for k in floats if k < 2]],
        Linear.BUT_FIRST: [[k for k in floats if k != 0]],
        Linear.BUT_SECOND: [[k for k in floats if k != 1]],
        Linear.NEVER: [],
        Linear.UNKNOWN: [],
    }[linear]


def bend(fn, operands, varied, sign=1):
    """How far a function is from affine in operands: at a midpoint, from the mean of its ends."""

    def towards(k, weight):
        a = jnp.asarray(operands[k])
        if k not in varied:
            return a
        other = sign * (0.5 * a + 0.3 * jnp.sin(7 * jnp.arange(a.size).reshape(a.shape)) ** 2)
        return ((1 - weight) * a + weight * other).astype(a.dtype)

    left, between, right = (
        jax.tree.leaves(fn(*(towards(k, weight) for k in range(len(operands)))))
        for weight in (0, 0.5, 1)
    )
    if not all(jnp.issubdtype(a.dtype, jnp.inexact) for a in left):
        return np.inf  # to integers is rounding
    errors = [abs((a + b) / 2 - c).max() for a, b, c in zip(left, right, between, strict=True)]
    return float(max(errors))


def floats_of(operands):
    return [k for k, a in enumerate(operands) if np.asarray(a).dtype.kind == "f"]


def test_linear_as_the_table_says(functions):
    uses = {
        name: (fn, *(X, Y, X * Y)[: len(signature)])
        for name, (fn, signature) in functions.items()
        if set(signature) == {"f"}
    }
    seen = set()
    for name, (fn, *operands) in {**uses, **USES}.items():
        assert name in names_of(fn, *operands), name
        linear, floats = TABLE[name].linear, floats_of(operands)
        for varied in affine_in(linear, operands):
            assert bend(fn, operands, varied) < 2e-3, (name, varied)
            seen.add(name)
        bent = max(bend(fn, operands, floats, sign) for sign in (1, -1, -5))
        if linear is Linear.NEVER and name != "nextafter":  # by less than can be seen
            assert not bent < 1e-3, name
        if linear is Linear.EACH or name == "div":
            assert bent > 1e-3, name
    claimed = {n for n, p in TABLE.items() if p.linear not in (Linear.NEVER, Linear.UNKNOWN)}
    hidden = {"broadcast_to", "pvary", "zeros_like", "complex", "conj", "imag", "real"}
    placing = {"layout_constraint", "relayout", "reshard", "with_memory_space_constraint"}
    assert claimed - seen <= hidden | placing


def test_additive_is_linear_and_no_product():
    assert not primitives.ADDITIVE & (primitives.LINEAR | primitives.PRODUCTS)
    assert primitives.SUMS | SPREAD | {"gather", "select_n", "reduce_sum"} <= primitives.ADDITIVE


# Modules that may name primitives: the table, rules of single primitives, and their equivalents.
ROOT = pathlib.Path(vfjax.__file__).parent
LOW = ("_jaxpr", "_analysis", "_propagate", "network")
FREE = {ROOT / "_jaxpr" / "primitives.py", ROOT / "_jaxpr" / "faster.py"}


def named(source, low):
    """Names of primitives that a module has as strings: `(line, name)`.

    Docstrings, the arguments of `rule` and parts of longer strings do not count. Above the low
    modules many names are words that mean something else ("name", "copy", "max"): there only those
    count that are compound, or that are compared with a primitive.
    """
    tree = ast.parse(source)
    skipped, compared = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):
            skipped.add(node.value)
        if isinstance(node, ast.JoinedStr):
            skipped.update(node.values)
        rule = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if rule and node.func.id == "rule" and low == "_propagate":
            skipped.update(node.args)
        if isinstance(node, ast.Compare) and "primitive" in ast.unparse(node):
            compared.update(ast.walk(node))
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in TABLE
        and node not in skipped
        and (low or "_" in node.value or node in compared)
    ]


def test_no_primitive_is_named_outside_the_table():
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        low = place.parts[0] if place.parts[0] in LOW else ""
        if path not in FREE:
            found += [(str(place), *at) for at in named(path.read_text(), low)]
    assert not found


@pytest.mark.parametrize(
    ("source", "low", "count"),
    [
        ('if equation.primitive == "sub": pass', "_analysis", 1),
        ('if equation.primitive in ("add", "neg"): pass', "", 2),
        ('KINDS = {"dot_general"}', "", 1),
        ('KINDS = {"sub": 1}', "network", 1),
        ('@rule("sub")\ndef f(step): pass', "_propagate", 0),
        ('@rule("sub")\ndef f(step): pass', "_analysis", 1),
        ('def f(copy=True):\n    "sub"\n    return {"name": 1, "max": 2}', "", 0),
        ('raise ValueError("no sub")', "_analysis", 0),
    ],
)
def test_a_planted_name_is_found(source, low, count):
    assert len(named(source, low)) == count


def test_kinds_are_all_in_use():
    assert {p.kind for p in TABLE.values()} == set(Kind)
