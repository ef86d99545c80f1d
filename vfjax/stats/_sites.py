"""Names of sites, and what they mean: the one place that documents them."""

from __future__ import annotations

from vfjax.network._arguments import check_net
from vfjax.network._network import Network
from vfjax.network._sites import Sites, select


def resolve_sites(net: Network, sites: Sites) -> tuple[str, ...]:
    """Names of the sites that a `sites=` argument stands for, and what all names mean.

    A site is a value inside a network, or a part of one. `net.sites` lists them, by name:

    - `<layer>`, such as `params/Conv_0/kernel`: the layer's pre-activation, its bias included. The
      second use of a shared kernel is `<layer>#2`, the fourth layer of an unrolled scan
      `<layer>[3]`.
    - `<layer>:act`, its tap: the last value of the elementwise region behind it (norm, activation,
      residual sum). A layer that nothing elementwise follows has its pre-activation there.
    - `<layer>:in`: what the layer reads. An edit there is for this layer alone.
    - `<norm>:in`: likewise, of a normalisation with stored statistics, named after its means.
    - `<layer>:act[<group>]`: where several groups show in a tap, the features of one of them.
    - `<layer>:act[<group> in <owner>]`, a joint tap: the features of a group that moves within each
      entry of another, as the dims of heads do.
    - `input` and `output` of the network.

    `Network.run`, `merge.Merged.run` and `vfjax.diagnose` read whole values: all of these but the
    last two of taps. `vfjax.stats` measures all of them. `vfjax.renorm` corrects pre-activations,
    so it takes `<layer>` alone, as `vfjax.prune` does for the layer's kernel.

    Channels, for statistics, are those of the group at a tap that shows one group, and in a part
    of a tap; the layer's or the norm's own axes elsewhere (of `<layer>:in` those that the kernel
    has too, as it contracts them); and all axes but the first of `input` and `output`.

    Args:
        net: The traced network.
        sites: A list of names, or one of these words, which mean the same in every function:
            `"paper"`: the pre-activations that the reference of REPAIR corrects: every main-path
            layer but the last and, where the network has a residual join, not the first.
            `"layers"`: the pre-activation of every layer, shortcuts, first and last included.
            `"all"`: the same; the word of `vfjax.renorm`. `"taps"`: the values behind the layers,
            as far as a function reads them. Here and in all statistics these are the taps at which
            groups show, group by group, each value once, joint taps at the end; where whole values
            are read, `<layer>:act` of every layer, the last one's included.

    Returns:
        Site names in the order of the network, or as listed.

    Raises:
        ValueError: If a name is none of the network's.
        TypeError: If `net` is not a traced network, or `sites` no string and no sequence of
            strings.

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
