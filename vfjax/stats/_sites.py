"""The names of sites and their meanings, documented in one place."""

from __future__ import annotations

from vfjax.network._arguments import check_net
from vfjax.network._network import Network
from vfjax.network._sites import Sites, select


def resolve_sites(net: Network, sites: Sites) -> tuple[str, ...]:
    """The names of the sites that a `sites=` argument stands for; explains all names.

    A site is a value inside a network, or a part of one. `net.sites` lists them by name:

    - `<layer>`, such as `params/Conv_0/kernel`: the layer's pre-activation, including its bias. The
      second use of a shared kernel is `<layer>#2`, the fourth layer of an unrolled scan
      `<layer>[3]`.
    - `<layer>:act`, its tap: the last value of the elementwise region after it (norm, activation,
      residual sum). If nothing elementwise follows the layer, this is its pre-activation.
    - `<layer>:in`: the value that the layer reads. An edit there affects this layer only.
    - `<norm>:in`: the value that a normalisation with stored statistics reads; the norm is named
      after its means.
    - `<leaf>:loop`, `<leaf>:loop#2`: what a loop returns that is kept whole, such as the states of
      a recurrent cell; it is named after the first kernel that it reads. Groups inside the loop
      that no layer outside shows have their taps there.
    - `<layer>:act[<group>]`: if several groups show in a tap, the features of one of them.
    - `<layer>:act[<group> in <owner>]`, a joint tap: the features of a group that moves within each
      entry of another, as the dims of heads do.
    - `input` and `output` of the network.

    `Network.run`, `merge.Merged.run` and `vfjax.diagnose` read whole values: all of these except
    the two kinds in brackets. `vfjax.stats` measures all of them. `vfjax.renorm` corrects
    pre-activations, so it takes only `<layer>`, as does `vfjax.prune`, for the layer's kernel.

    For statistics, the channels at a tap that shows one group, and in a part of a tap, are those of
    the group; at other sites of a layer or norm they are its channel axes (at `<layer>:in` those
    that the layer contracts); at `input` and `output` they are all axes but the first.

    Args:
        net: The traced network.
        sites: A list of names, or one of these words, which mean the same in every function:
            `"paper"`: the pre-activations that the reference of REPAIR corrects: of every main-path
            layer but the last and, if the network has a residual join, the first.
            `"layers"`: the pre-activation of every layer, including shortcuts, first and last.
            `"all"`: the same; the word of `vfjax.renorm`. `"taps"`: the values after the layers, as
            the function reads them. Here and in all statistics these are the taps that show groups,
            group by group, each value once, joint taps at the end, and then the whole taps whose
            channels show groups across each other (as heads and dims that share a scale), which
            only matching reads; for functions that read whole values, `<layer>:act` of every layer,
            including the last.

    Returns:
        Site names, in the order of the network or as listed.

    Raises:
        ValueError: If the network does not have a site of some name.
        TypeError: If `net` is not a traced network, or `sites` is neither a string nor a sequence
            of strings.

    Example:
        >>> import jax.numpy as jnp, vfjax
        >>> v = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 2))}
        >>> net = vfjax.trace(lambda v, x: x @ v["a"] @ v["b"] @ v["c"], v, jnp.ones((1, 3)))
        >>> resolve_sites(net, "paper"), resolve_sites(net, "layers")
        (('a', 'b'), ('a', 'b', 'c'))
        >>> resolve_sites(net, "taps"), resolve_sites(net, ["c:in", "output"])
        (('a:act', 'b:act'), ('c:in', 'output'))
    """
    check_net(net)
    return select(net, sites)
