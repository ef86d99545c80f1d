"""Vision transformers: pairs of them, what their units are, and what becomes of these."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import vfjax
from kit import cli, edges, pairs, timing
from kit.experiment import Setup
from vfjax import align, data, models, stats, train

MODELS = ("vit", "deit-tiny")
# Layers of a block that count: query, key and value together, then out, mlp1 and mlp2.
PER_BLOCK = 4
# Those trained for the digits, in seconds.
DIGITS = models.ViT(blocks=3, patch=4, features=32, heads=4)
DIGITS_RECIPE = train.Recipe(optimizer="adamw", learning_rate=2e-3, schedule="cosine", epochs=20,
                             warmup_epochs=2.0, batch_size=100, weight_decay=0.05)  # fmt: skip


def prepare(config: Any, watch: timing.Stopwatch) -> Setup:
    """The two networks: small ones trained here for the digits, else as the options have it."""
    if config.dataset != "digits":
        edges.check_shipped(config)
    with watch("data"):
        probe = edges.probed(config.dataset, config.data_dir)
    own = probe.name == "digits"
    if own and (config.preset == "paper" or config.retrain or config.model is not None):
        why = "CIFAR-10 was not found, give --data-dir; for the digits it"
        raise cli.UserError(
            f"{why if probe.fallback else '--dataset digits'} trains its own small networks: leave "
            "out --model, --retrain and --preset paper."
        )
    model = DIGITS if own else models.create(config.model[0] if config.model else MODELS[0])
    blocks = pairs.counts("blocks", config.blocks, range(model.blocks + 1), model.blocks)
    config = dataclasses.replace(config, blocks=blocks)
    loaded = edges.loaded(statistics="samples", held_out="held_out", test="test", cifar=MODELS[0])
    found = trained(config, watch, probe) if own else loaded(config, watch)
    found.record["model"]["blocks"] = model.blocks
    return found


def trained(config: Any, watch: timing.Stopwatch, probe: data.Dataset) -> Setup:
    with watch("data"):
        dataset = edges.whole(probe, config.data_dir, test=config.test)
    with watch("trace"):
        net = edges.traced(DIGITS, dataset)
    with watch("training"):
        trees = [train.fit(DIGITS, DIGITS_RECIPE, dataset, seed=s).variables for s in (0, 1)]
    count = config.samples + config.held_out
    first = {key: getattr(dataset, key)[:count] for key in ("train_images", "train_labels")}
    first = dataclasses.replace(dataset, **first)
    images = edges.images_of(first, config.samples, config.held_out, config.test)
    arch = edges.Architecture("vit", 1.0, "digits")
    found = edges.Edges(arch, dataset, net, (), trees, images)
    return found.setup(config, seeds={"edge_models": [0, 1]})


def layers_of(blocks: int) -> int:
    """How many layers are kept apart with so many blocks.

    Example:
      >>> layers_of(0), layers_of(2)
      (0, 9)
    """
    return 1 + PER_BLOCK * blocks if blocks else 0


def kind_of(net: vfjax.Network, group: str) -> str:
    """What the units of a group are, a key of `KINDS`."""
    paths = {axis.path for axis in net.spec.groups[group]}
    if any(path.endswith("positions") for path in paths):
        return "stream"
    return "attention" if any("attention" in path for path in paths) else "hidden"


def maps_of(
    net: vfjax.Network, trees: Sequence[Any], moments: stats.Moments, plan: str, weight: float = 0
) -> align.Maps:
    """What becomes of the units in a column; `weight` is that of the entropy of plans."""
    if plan == "direct":
        return align.Maps.of_permutations([None, None])
    if plan == "permuted":
        return align.Maps.of_permutations([None, align.match_moments(net, moments).permutations])
    if plan == "weights":
        return align.transport(net, trees, on="weights")
    return align.transport_moments(net, moments, regularization=weight)
