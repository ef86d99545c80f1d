"""Elementwise primitives: operands are paired entry by entry."""

from __future__ import annotations

from vfjax._propagate.registry import Axes, Step, opaque, rule

_UNARY = """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj
    convert_element_type copy copy_p cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor imag
    integer_pow is_finite lgamma log log1p log2 logistic name neg not one_minus_square
    population_count real reduce_precision round rsqrt sign sin sinh sqrt square stop_gradient tan
    tanh zeros_like
""".split()

_SEVERAL = """
    add add_any and atan2 clamp complex div eq eq_to ge gt igamma igamma_grad_a igammac le le_to lt
    lt_to max min mul mulhi ne nextafter or polygamma polynomial pow regularized_incomplete_beta rem
    select_n shift_left shift_right_arithmetic shift_right_logical sub xor zeta
""".split()

# Where an array lives, or how it is laid out in memory, is no business of its entries.
_PLACEMENT = """
    device_put layout_constraint mesh_cast optimization_barrier pvary reshard sharding_constraint
    with_memory_space_constraint
""".split()


@rule(*_UNARY, *_SEVERAL, lazy=True)
def elementwise(step: Step) -> list[Axes]:
    """Ties the operands along every dimension in which they are not broadcast.

    A dimension of size 1 may meet a longer one inside the primitive (jax 0.12), which ties nothing;
    a scalar operand (of `clamp`, `select_n` or a literal) ties nothing either.
    """
    (shape,) = step.shapes
    full = [value for value in step.inputs if value.shape]
    if any(len(value.shape) != len(shape) for value in full):
        return opaque(step)
    axes = []
    for k, n in enumerate(shape):
        parts = [value.axes[k] for value in full if value.shape[k] == n]
        for part in parts[1:]:
            step.unify(parts[0], part)
        axes.append(parts[0] if parts else step.free(n))
    return [axes]


@rule(*_PLACEMENT, lazy=True)
def placement(step: Step) -> list[Axes]:
    """Hands every operand through."""
    return [value.axes for value in step.inputs]


@rule("bitcast_convert_type")
def bitcast(step: Step) -> list[Axes]:
    """Elementwise between types of equal width; else the last dimension comes, goes or changes."""
    (value,), (shape,) = step.inputs, step.shapes
    if value.shape == shape:
        return [value.axes]
    kept = min(len(shape), len(value.shape))
    if value.shape[:kept] != shape[:kept]:
        return opaque(step)
    step.fix(*value.axes[kept:])
    return [value.axes[:kept] + [step.fixed(n) for n in shape[kept:]]]


@rule("debug_callback", "debug_print")
def debug(step: Step) -> list[Axes]:
    """Prints, and so changes no output of the network."""
    return [[step.fixed(n) for n in shape] for shape in step.shapes]
