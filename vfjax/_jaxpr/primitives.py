"""The one table of what each primitive does, which every other module looks up.

A primitive that is missing here is unknown: it is assumed to fix the axes that it touches, to mix
examples, and not to be affine. Symmetries may then be missed, never invented.

Two other places name primitives themselves: the rules of `vfjax._propagate`, one function for each,
and `faster`, which replaces single ones.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Kind(enum.Enum):
    """What a primitive does to the entries of its operands."""

    CAST = (
        "passes each operand through; at most its precision, device, memory layout or name changes"
    )
    LAYOUT = "rearranges the entries of one operand, each of them once"
    BROADCAST = "repeats one operand along new dimensions, or along those of size one"
    ELEMENTWISE = "maps each position of its operands to the same position of one result"
    REDUCTION = "combines the entries along `axes`, in any order"
    CHOICE = "returns where along `axes` an entry is"
    CUMULATIVE = "combines each entry with those before it along `axis`"
    WINDOW = "combines the entries of windows: a pool"
    LAYER = "contracts an operand with another one, which may be a kernel"
    SCATTER = "writes slices into an operand, where indices say"
    MATRIX = "factorises matrices, or solves with their factors"
    DRAW = "draws numbers, or makes keys to draw them with"
    INDEXING = "picks, places, joins, repeats or reorders entries"
    INLINE = "calls a jaxpr, and only delimits it"
    CUSTOM = "calls a jaxpr that has custom derivatives, or rules of its own otherwise"
    LOOP = "runs a jaxpr several times, or one of several"
    OTHER = "none of these"


class Linear(enum.Enum):
    """In which operands, varied together, a primitive is affine over the real numbers."""

    JOINTLY = "in all of them"
    EACH = "in any single one, if the others are given"
    FIRST = "in the first, if the others are given"
    FIRST_TWO = "in the first two, if the others are given"
    BUT_FIRST = "in all but the first, which is given"
    BUT_SECOND = "in all but the second, which is given"
    NEVER = "in none"
    UNKNOWN = "not known"


class Primitive(NamedTuple):
    """What is known of a primitive.

    Attributes:
        kind: What it does to entries.
        linear: In which operands it is affine. For a cast this holds between floats; a cast to
            integers rounds.
    """

    kind: Kind
    linear: Linear


_FAMILIES: tuple[tuple[Kind, Linear, str], ...] = (
    (
        Kind.CAST,
        Linear.JOINTLY,
        """convert_element_type copy device_put layout_constraint name optimization_barrier pvary
        reduce_precision relayout reshard sharding_constraint stop_gradient
        with_memory_space_constraint""",
    ),
    (Kind.LAYOUT, Linear.JOINTLY, "reshape squeeze transpose"),
    (Kind.BROADCAST, Linear.JOINTLY, "broadcast_in_dim broadcast_to"),
    (Kind.ELEMENTWISE, Linear.JOINTLY, "add add_any complex conj imag neg real sub zeros_like"),
    (Kind.ELEMENTWISE, Linear.EACH, "mul"),
    (Kind.ELEMENTWISE, Linear.FIRST, "div"),
    (Kind.ELEMENTWISE, Linear.BUT_FIRST, "select_n"),
    (
        Kind.ELEMENTWISE,
        Linear.NEVER,
        """abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
        cos cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a
        igammac integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mulhi
        ne nextafter not one_minus_square or polygamma polynomial population_count pow
        regularized_incomplete_beta rem round rsqrt shift_left shift_right_arithmetic
        shift_right_logical sign sin sinh sqrt square tan tanh xor zeta""",
    ),
    (Kind.REDUCTION, Linear.JOINTLY, "reduce_sum"),
    (
        Kind.REDUCTION,
        Linear.NEVER,
        "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_xor",
    ),
    (Kind.CHOICE, Linear.NEVER, "argmax argmin"),
    (Kind.CUMULATIVE, Linear.JOINTLY, "cumsum"),
    (Kind.CUMULATIVE, Linear.NEVER, "cumlogsumexp cummax cummin cumprod"),
    (Kind.WINDOW, Linear.FIRST, "reduce_window_sum"),
    (Kind.WINDOW, Linear.NEVER, "reduce_window_max reduce_window_min"),
    (Kind.WINDOW, Linear.UNKNOWN, "reduce_window"),
    (Kind.LAYER, Linear.EACH, "conv_general_dilated dot_general ragged_dot_general"),
    (Kind.INDEXING, Linear.JOINTLY, "concatenate pad rev slice split stack tile unstack"),
    (Kind.INDEXING, Linear.FIRST, "dynamic_slice gather"),
    (Kind.INDEXING, Linear.FIRST_TWO, "dynamic_update_slice"),
    (Kind.SCATTER, Linear.BUT_SECOND, "scatter scatter-add scatter-sub"),
    (Kind.SCATTER, Linear.FIRST, "scatter-mul"),
    (Kind.SCATTER, Linear.NEVER, "scatter-max scatter-min"),
    (Kind.MATRIX, Linear.BUT_FIRST, "triangular_solve"),
    (Kind.MATRIX, Linear.UNKNOWN, "custom_linear_solve"),
    (
        Kind.MATRIX,
        Linear.NEVER,
        """cholesky cholesky_update eig eigh geqp3 geqrf hessenberg householder_product lu
        lu_pivots_to_permutation ormqr qr schur svd tridiagonal tridiagonal_solve""",
    ),
    (
        Kind.DRAW,
        Linear.NEVER,
        """philox2x32 philox4x32 random_bits random_clone random_fold_in random_gamma random_seed
        random_split random_unwrap random_wrap rng_bit_generator rng_uniform threefry2x32
        threefry4x32""",
    ),
    (Kind.INLINE, Linear.UNKNOWN, "closed_call custom_lin jit remat2"),
    (Kind.CUSTOM, Linear.UNKNOWN, "composite custom_jvp_call custom_vjp_call custom_vmap_call"),
    (Kind.LOOP, Linear.UNKNOWN, "cond scan while"),
    (Kind.OTHER, Linear.JOINTLY, "fft"),
    (Kind.OTHER, Linear.FIRST, "select_and_gather_add select_and_scatter_add"),
    (Kind.OTHER, Linear.NEVER, "approx_top_k bitcast_convert_type sort top_k"),
    (Kind.OTHER, Linear.UNKNOWN, "select_and_scatter"),
    (Kind.OTHER, Linear.UNKNOWN, "debug_callback debug_print iota reduce"),
)

TABLE: dict[str, Primitive] = {
    name: Primitive(kind, linear) for kind, linear, names in _FAMILIES for name in names.split()
}
"""What is known of each primitive, by its name in jax 0.10 and 0.12."""


def _of(*kinds: Kind) -> frozenset[str]:
    return frozenset(name for name, primitive in TABLE.items() if primitive.kind in kinds)


CAST = _of(Kind.CAST)
"""Primitives that pass each operand through as a separate result."""

LAYOUT = _of(Kind.LAYOUT)
SPREAD = _of(Kind.CAST, Kind.LAYOUT, Kind.BROADCAST)
"""Primitives that only rearrange or repeat entries."""

ELEMENTWISE = _of(Kind.CAST, Kind.ELEMENTWISE)
"""Primitives that map each position of their operands to the same position of the result."""

REDUCTIONS = _of(Kind.REDUCTION, Kind.CHOICE)
CHOICES = _of(Kind.CHOICE)
CUMULATIVE = _of(Kind.CUMULATIVE)
WINDOWS = _of(Kind.WINDOW)
LINEAR = _of(Kind.LAYER)
"""Primitives that a layer is made of."""

SCATTERS = _of(Kind.SCATTER)
OVERWRITES = frozenset({"scatter"})
"""Primitives of which a result may depend on the order of its updates."""

FACTORISATIONS = _of(Kind.MATRIX) - {"custom_linear_solve", "triangular_solve"}
VECTORS = frozenset({"lu_pivots_to_permutation", "tridiagonal_solve"})
"""Factorisations of which the first operand is a vector, or vectors."""

DRAWS = _of(Kind.DRAW)
LOOPS = _of(Kind.LOOP)
"""Primitives that run jaxprs several times, or one of several."""
LOOKUPS = frozenset(
    name for name, p in TABLE.items() if p.kind is Kind.INDEXING and p.linear is Linear.FIRST
)
"""Primitives that read entries of their first operand where the others say."""

INLINE = _of(Kind.INLINE)
"""Calls that only delimit."""

CUSTOM = _of(Kind.CUSTOM)
"""Calls with rules of their own, of derivatives for example."""

_NOT_ADDITIVE = Linear.EACH, Linear.NEVER, Linear.UNKNOWN
ADDITIVE = frozenset(name for name, p in TABLE.items() if p.linear not in _NOT_ADDITIVE) - {"div"}
"""Primitives whose results are sums of entries of their operands, up to signs."""

# Primitives that are compared with by name.
BROADCAST, RESHAPE, SQUEEZE, TRANSPOSE = "broadcast_in_dim", "reshape", "squeeze", "transpose"
CONCATENATE, PAD, REV, SLICE, SPLIT = "concatenate", "pad", "rev", "slice", "split"
GATHER = "gather"
STACK, TILE, UNSTACK, SORT = "stack", "tile", "unstack", "sort"
CONV, DOT, RAGGED_DOT = "conv_general_dilated", "dot_general", "ragged_dot_general"
COND, SCAN, WHILE = "cond", "scan", "while"
DIV, MAX, MUL, NEG, SUB = "div", "max", "mul", "neg", "sub"
INTEGER_POW, POW, RSQRT, SQRT, SQUARE = "integer_pow", "pow", "rsqrt", "sqrt", "square"

ADD = frozenset({"add", "add_any"})
SUMS = ADD | {SUB}
PRODUCTS = frozenset({MUL, DIV})
ROOTS = frozenset({SQRT, RSQRT, POW})
MOMENTS = frozenset({MAX, SQUARE, INTEGER_POW, "abs", "select_n"})
"""Primitives that moments are computed with, besides sums, products and roots."""

ACTIVATIONS = frozenset({MAX, "cos", "erf", "erfc", "exp", "logistic", "sin", "tanh"})
"""Nonlinear primitives that each count as one activation."""

TOTALS = frozenset({"reduce_sum", "psum"})
"""Primitives that sum over whole axes; `psum` does over one that `vmap` named."""

RANDOM = frozenset({"random_bits", "random_gamma", "rng_bit_generator", "rng_uniform"}) | {
    "threefry2x32"
}
"""Primitives that draw random numbers."""

POOLS = WINDOWS | {"reduce_max", "reduce_sum"}
"""Primitives that make up a pool over windows or over all positions."""
