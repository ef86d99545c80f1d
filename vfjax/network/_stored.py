"""The stored statistics of norms: what leaves stand for, and the leaves that stand for moments.

A leaf need not be a mean or a variance: a running average may be divided by a scalar of the
parameters before it is used, and a standard deviation may be stored in place of a variance. Rooms
above read and write moments; only this module and `vfjax._analysis` know how they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vfjax._trees import changed
from vfjax._types import Array
from vfjax.network._retrace import traces_of

if TYPE_CHECKING:
    from vfjax.network._network import Network


class Part(NamedTuple):
    """A leaf, or with a slot the slice of a leaf that one layer of an unrolled scan reads."""

    path: str
    slot: int | None

    def __str__(self) -> str:
        return self.path if self.slot is None else f"{self.path}[{self.slot}]"

    def read(self, leaves: Mapping[str, Any]) -> Array:
        """The part's entries in float32 or better, flat."""
        leaf = leaves[self.path]
        leaf = leaf if self.slot is None else leaf[self.slot]
        return leaf.reshape(-1).astype(jnp.promote_types(leaf.dtype, jnp.float32))

    def write(self, leaves: Mapping[str, Any], value: Any) -> Array:
        """The leaf with other entries in this part, given flat, in the leaf's dtype."""
        return changed(leaves[self.path], self.slot, lambda _: value)


class Stored(NamedTuple):
    """The moments that a norm has stored, by channel, shaped like its channel axes.

    Attributes:
        mean: Means.
        var: Variances, without what the norm adds to them.
    """

    mean: Any
    var: Any


def statistics_of(net: Network, norm: str) -> tuple[Part, Part]:
    """The leaves that hold a norm's mean and its variance, or standard deviation."""
    record, site = net.norm(norm), traces_of(net).reference.norms[norm]
    return Part(record.mean, site.mean.slot), Part(record.var, site.var.slot)


def stored(net: Network, norm: str, leaves: Mapping[str, Any]) -> Stored:
    """What a norm has stored.

    Args:
        net: The traced network.
        norm: Name of the norm.
        leaves: Leaves of its variables by path, among them those of the norm's statistics.
    """
    traced = traces_of(net).reference
    site, scalars = traced.norms[norm], traced.scalars(leaves)
    mean, var = (_by_channel(net, norm, part.read(leaves)) for part in statistics_of(net, norm))
    return Stored(site.mean_of(mean, scalars), site.deviation.variance(var, scalars))


def storing(
    net: Network, norm: str, leaves: Mapping[str, Any], moments: Stored
) -> dict[str, Array]:
    """The leaves with other moments stored in a norm, in the dtypes of the old ones.

    Args:
        net: The traced network.
        norm: Name of the norm.
        leaves: Leaves of its variables by path.
        moments: Means and variances, shaped like the norm's channel axes.

    Returns:
        Those leaves that change, by path.
    """
    traced = traces_of(net).reference
    site, scalars = traced.norms[norm], traced.scalars(leaves)
    values = (
        site.leaf_for(moments.mean, scalars),
        site.deviation.leaf_for(moments.var, scalars),
    )
    return {
        part.path: part.write(leaves, _by_entry(site.order, value))
        for part, value in zip(statistics_of(net, norm), values, strict=True)
    }


def deviation_ratio(
    net: Network, norm: str, leaves: Mapping[str, Any], old: Any, new: Any
) -> Array:
    """What a norm divides by at one variance, over what it divides by at another.

    Args:
        net: The traced network.
        norm: Name of the norm.
        leaves: Leaves of its variables by path.
        old: The variance above the line, by channel.
        new: The variance below the line.
    """
    traced = traces_of(net).reference
    of, scalars = traced.norms[norm].deviation, traced.scalars(leaves)
    return of.ratio(of.leaf_for(old, scalars), of.leaf_for(new, scalars), scalars)


def deviation(net: Network, norm: str, leaves: Mapping[str, Any], var: Any) -> Any:
    """What a norm divides by at a variance, by channel; arguments as for `deviation_ratio`."""
    traced = traces_of(net).reference
    of, scalars = traced.norms[norm].deviation, traced.scalars(leaves)
    return of.at(of.leaf_for(var, scalars), scalars)


def variance_at(net: Network, norm: str, leaves: Mapping[str, Any], deviation: Any) -> Any:
    """The variance at which a norm divides by a deviation, by channel."""
    traced = traces_of(net).reference
    of, scalars = traced.norms[norm].deviation, traced.scalars(leaves)
    return of.variance(of.leaf_at(deviation, scalars), scalars)


def _by_channel(net: Network, norm: str, entries: Array) -> Array:
    site, record = traces_of(net).reference.norms[norm], net.norm(norm)
    shape = tuple(record.input_shape[a] for a in record.channel_axes)
    if entries.size != site.order.size:  # a model of other widths
        return entries
    return _take(entries, site.order).reshape(shape)


def _by_entry(order: np.ndarray, value: Any) -> Any:
    value = value.reshape(-1)
    return _take(value, np.argsort(order)) if value.size == order.size else value


def _take(values: Any, order: np.ndarray) -> Any:
    """`values[order]`, without a gather where the order is that of the values."""
    return values if np.array_equal(order, np.arange(order.size)) else values[order]
