"""What the experiments on linear networks share: options, edge models, pairs of them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import _common
import jax
import jax.numpy as jnp

import vfjax
from vfjax import data, models, train

PyTree = Any

BATCH = 500
SAMPLES = 10_000
# --quick: to see that it runs. Nothing is learnt.
QUICK_EPOCHS, QUICK_IMAGES = 1, 300
MNIST_IMAGES = 60_000


def parser(
    name: str, doc: str | None, *, seeds: Sequence[int], epochs: int
) -> argparse.ArgumentParser:
    """The options that experiments on linear networks have."""
    p = argparse.ArgumentParser(prog=f"{name}.py", description=doc, formatter_class=_common.Help)
    p.add_argument(
        "--dataset",
        default="auto",
        choices=("auto", "mnist", "digits"),
        help="images to train and test on; auto is MNIST where it is found, else, with a warning "
        "and in the figure's title, the digits that come with scikit-learn",
    )
    p.add_argument(
        "--seeds",
        type=_common.seed_of,
        nargs="+",
        default=list(seeds),
        metavar="S",
        help="seeds of the edge models; the first and the second make a pair, the third and the "
        "fourth another, and so on",
    )
    p.add_argument(
        "--epochs",
        type=_common.count_of("epochs"),
        help=f"passes over the training images (default: {epochs}, the paper's; for the digits as "
        "many as make equally many steps)",
    )
    p.add_argument(
        "--preset",
        default="paper",
        choices=("paper",),
        help="networks, recipe and number of models are the paper's, which two cores can train",
    )
    p.add_argument(
        "--quick",
        action="store_true",
        help=f"one pair, {QUICK_EPOCHS} epoch on {QUICK_IMAGES} images: to see that it runs; the "
        "numbers mean nothing",
    )
    _common.folder_options(p)
    return p


def pairs_of(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The seeds of each pair: no model is in two of them, so that pairs are independent.

    Raises:
      UserError: If seeds do not come in pairs, or one comes twice.

    Example:
      >>> pairs_of(argparse.Namespace(seeds=[0, 1, 2, 3], quick=False))
      [(0, 1), (2, 3)]
    """
    seeds = args.seeds
    if len(seeds) % 2 or len(set(seeds)) != len(seeds):
        raise _common.UserError(f"--seeds must be different and come in pairs, got {seeds}.")
    pairs = list(zip(seeds[::2], seeds[1::2], strict=True))
    return pairs[:1] if args.quick else pairs


def load(args: argparse.Namespace) -> data.Dataset:
    """The images, as the options have it."""
    count = QUICK_IMAGES if args.quick else None
    return data.load(args.dataset, args.data_dir, train=count, test=count, prefer="mnist")


def recipe_of(
    args: argparse.Namespace, recipe: train.Recipe, dataset: data.Dataset
) -> train.Recipe:
    """The paper's recipe, with the epochs that the options or the number of images ask for."""
    epochs = args.epochs
    if epochs is None and dataset.name == "digits":
        steps = math.ceil(len(dataset.train_images) / recipe.batch_size)
        epochs = round(recipe.epochs * math.ceil(MNIST_IMAGES / recipe.batch_size) / steps)
    if args.quick:
        epochs = QUICK_EPOCHS
    return recipe if epochs is None else dataclasses.replace(recipe, epochs=epochs)


def trace(model: models.LinearNetwork, dataset: data.Dataset) -> vfjax.Network:
    """Traces the network, for which its shapes are enough."""
    x = jax.ShapeDtypeStruct((BATCH, *dataset.test_images.shape[1:]), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return vfjax.trace(models.apply_fn(model), variables, x)


def record_of(
    name: str,
    args: argparse.Namespace,
    command: str,
    dataset: data.Dataset,
    recipe: train.Recipe,
) -> dict[str, Any]:
    """What the records of these experiments begin with."""
    return {
        "experiment": name,
        "command": command,
        "config": vars(args) | {"epochs": recipe.epochs, "asked_epochs": args.epochs},
        "data": {
            "name": dataset.name,
            "source": dataset.source.split(" in ")[0],
            "fallback": dataset.fallback,
            "train_images": len(dataset.train_images),
            "test_images": len(dataset.test_images),
            "statistics_images": min(SAMPLES, len(dataset.train_images)),
            "batch_size": BATCH,
            "augmented": False,
        },
        "recipe": dataclasses.asdict(recipe),
    }


def model_record(model: models.LinearNetwork, net: vfjax.Network) -> dict[str, Any]:
    """What a record says of a network."""
    return {
        "name": "linear",
        "width": model.width,
        "depth": model.depth,
        "residual": model.residual,
        "initial_std": model.std,
        "parameters": net.parameters,
    }


def titled(record: dict[str, Any], what: str) -> str:
    """A title: data, networks, number of pairs."""
    count = len(record["pairs"])
    parts = [f"{_common.dataset_label(record['data'], 'mnist')}: {what}"]
    parts += [f"mean of {count} pairs"] if count > 1 else []
    parts += ["QUICK, MEANS NOTHING"] if record["config"]["quick"] else []
    return ", ".join(parts)


def file_name(record: dict[str, Any], *, seeds: Sequence[int], epochs: int) -> str:
    """Name of record and figure, without suffix: what was asked for and is not default."""
    config, parts = record["config"], [record["experiment"], record["data"]["name"]]
    if config["quick"]:
        return "-".join([*parts, "quick"])
    if list(config["seeds"]) != list(seeds):
        parts.append("seeds" + "+".join(map(str, config["seeds"])))
    if config["asked_epochs"] not in (None, epochs):
        parts.append(f"epochs{config['asked_epochs']}")
    return "-".join(parts)
