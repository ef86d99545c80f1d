"""What a matrix product contracts, whichever primitive it is; one that contracts nothing scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax import lax

from vfjax._jaxpr.primitives import DOT, LINEAR, RAGGED_DOT
from vfjax._types import Array

Dims = Sequence[int]


class Contraction(NamedTuple):
    """Dimensions of the two operands of a product, other than those that it keeps.

    Attributes:
        contract: Those that are summed over, of either operand.
        batch: Those that are paired and kept, of either operand.
        experts: Those of the second operand that choose a kernel for each run of rows.
    """

    contract: tuple[Dims, Dims]
    batch: tuple[Dims, Dims]
    experts: Dims = ()

    def kept(self, side: int, rank: int) -> list[int]:
        """The other dimensions of an operand."""
        taken = {*self.contract[side], *self.batch[side], *(self.experts if side else ())}
        return [k for k in range(rank) if k not in taken]


def contraction(name: str, params: Mapping[str, Any]) -> Contraction | None:
    """What a product contracts, from its primitive's name and parameters; None for others."""
    if name == DOT:
        contract, batch = params["dimension_numbers"]
        return Contraction(contract, batch)
    if name == RAGGED_DOT:
        numbers = params["ragged_dot_dimension_numbers"]
        contract, batch = numbers.dot_dimension_numbers
        return Contraction(contract, batch, numbers.rhs_group_dimensions)
    return None


def is_linear(eqn: Any) -> bool:
    """Whether an equation is one that layers are made of: a convolution, or a product that sums."""
    name = eqn.primitive.name
    product = contraction(name, eqn.params) if name in LINEAR else None
    return name in LINEAR and (product is None or bool(product.contract[0]))


def as_scale(eqn: Any, left: Array, right: Array) -> Array:
    """A product that contracts nothing, written as a multiplication: `einsum("bd,d->bd")`."""
    _, batch = eqn.params["dimension_numbers"]
    dtype = eqn.outvars[0].aval.dtype
    free = [
        [k for k in range(a.ndim) if k not in dims]
        for a, dims in zip((left, right), batch, strict=True)
    ]
    moved = left.transpose(*batch[0], *free[0]), right.transpose(*batch[1], *free[1])
    shared, extra = len(batch[0]), len(free[0])
    shape = (*moved[0].shape, *moved[1].shape[shared:])
    dims = range(shared + extra), (*range(shared), *range(shared + extra, len(shape)))
    factors = (
        lax.broadcast_in_dim(lax.convert_element_type(a, dtype), shape, k)
        for a, k in zip(moved, dims, strict=True)
    )
    return lax.mul(*factors)
