"""The warning of layers that no alignment can match."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from typing import TYPE_CHECKING

from vfjax.network._records import Layer

if TYPE_CHECKING:
    from vfjax.network._network import Network

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_WARNED: weakref.WeakSet[Network] = weakref.WeakSet()


def warn_of_fixed(net: Network, start: int = 0, stop: int | None = None) -> None:
    """Warns, once per network, if no permutation can match the channels of a layer.

    Args:
        net: The traced network.
        start: Layers of a smaller depth than this do not count.
        stop: Nor do those of a larger depth than this; None for all but the last, whose channels
            are the outputs.
    """
    if net in _WARNED:
        return
    last = net.depth - 1 if stop is None else min(stop, net.depth - 1)
    causes = {
        layer.name: cause
        for layer in net.layers
        if max(start, 1) <= layer.depth <= last
        and layer.group is None
        and layer.channels != 1
        and (cause := _cause(net, layer)) is not None
    }
    if not causes:
        return
    _WARNED.add(net)
    (name, (primitive, where)), *others = causes.items()
    count = f"{len(others)} other layer" + "s" * (len(others) > 1)
    more = f" (nor those of {count})" if others else ""
    warnings.warn(
        f"the channels of layer '{name}' cannot be permuted, because of `{primitive}` at "
        f"{where}{more}: no alignment can match them, so merging them may lose accuracy. "
        "net.spec.fixed lists all such axes.",
        UserWarning,
        stacklevel=_stacklevel(),
    )


def _cause(net: Network, layer: Layer) -> tuple[str, str] | None:
    """Primitive and source line that fixed a layer's channels.

    None where the channels are tied to the network's input or output, by a skip connection for
    example: all models share that basis, so there is nothing to match.
    """
    # A layer whose kernel is computed is named after the largest leaf of it.
    path = layer.bias or layer.kernel or layer.name.partition("#")[0]
    if path not in net.paths:
        return None
    shape, sizes = net.leaves([path])[path].shape, (*layer.channel_shape, layer.channels)
    fixed = [f for f in net.spec.fixed if f.path == path and shape[f.axis] in sizes]
    if any(f.primitive in ("output", "unused") for f in fixed):
        return None
    # The kernel's other axis may be tied to the input, and have the same size.
    fixed = [f for f in fixed if f.primitive != "input"]
    return (fixed[-1].primitive, fixed[-1].where) if fixed else None


def _stacklevel() -> int:
    """The level of the caller's code: the first frame outside of this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    return level
