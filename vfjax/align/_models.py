"""What matchers by activations take as `net`: one network for all models, or one per model."""

from __future__ import annotations

from collections.abc import Sequence

from vfjax._trees.paths import check_sequence
from vfjax._types import PyTree
from vfjax.network._arguments import check_comparable, networks
from vfjax.network._network import Network
from vfjax.stats._moments import Moments
from vfjax.stats._sites import resolve_sites, site_of, taps_by_site


def check_at_taps(net: Network | Sequence[Network], trees: Sequence[PyTree]) -> tuple[Network, ...]:
    """Checks that models can be matched by what their groups show at the taps.

    Args:
        net: The traced network, or one per tree.
        trees: The trees, which behind the taps may differ in shape.

    Returns:
        One network per tree.

    Raises:
        TypeError: If `net` is no traced network, or a tree holds a leaf that is no array.
        ValueError: If there are fewer than two trees, they differ before a tap, or hold NaN or
            infinity.
    """
    check_sequence(trees, name="trees")
    nets = networks(net, len(trees))
    taps = taps_by_site(nets[0])
    sites = resolve_sites(nets[0], "taps")
    check_comparable(nets, trees, [site_of(nets[0], site, taps).source for site in sites])
    if len(trees) < 2:
        raise ValueError(f"trees must be two or more, got {len(trees)}")
    return nets


def network_of(net: Network | Sequence[Network], moments: Moments) -> Network:
    """The network whose taps and groups stand for those of all models.

    Args:
        net: The traced network, or one per model; these show their groups alike.
        moments: Moments of the models.

    Raises:
        TypeError: If `net` is no traced network.
        ValueError: If there are not as many networks as models.
    """
    return net if isinstance(net, Network) else networks(net, moments.models)[0]
