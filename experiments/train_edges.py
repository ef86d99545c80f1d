"""Trains the edge models that the experiments merge, and writes them as checkpoints with cards.

The shipped ones, each about as long as its card says:

    python experiments/train_edges.py --model vgg16 --width 0.25 --seeds 0 1 2
    python experiments/train_edges.py --model resnet20 --width 0.5 --seeds 0 1
    python experiments/train_edges.py --model digits-mlp --seeds 0 1
    python experiments/train_edges.py --model digits-conv --seeds 0 1

A run that is stopped, at any moment and by anything, goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from vfjax import checkpoint, data, models, train

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")
# The train accuracy on the card is of so many images, not augmented.
TRAIN_SUBSET = 10_000


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=formatter)
    p.add_argument("--model", default="vgg16", choices=models.NAMES, help="architecture")
    p.add_argument("--width", type=float, default=1.0, help="multiplier of all channel counts")
    p.add_argument(
        "--dataset",
        default="auto",
        choices=data.NAMES,
        help="training data; auto is digits for the digits models, else CIFAR-10",
    )
    p.add_argument("--data-dir", help="folder of TFDS data sets (default: TFDS_DATA_DIR)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="one model is trained for each")
    p.add_argument(
        "--preset",
        default="cpu",
        choices=("cpu", "paper"),
        help="recipe: what two cores finish, or the paper's Table 2",
    )
    p.add_argument("--recipe", choices=sorted(train.RECIPES), help="recipe by name, over --preset")
    for field, text in (
        ("epochs", "passes over the training split"),
        ("learning_rate", "peak learning rate"),
        ("weight_decay", "L2 penalty of all parameters"),
        ("batch_size", "images per step"),
        ("warmup_epochs", "epochs of linear warm-up"),
    ):
        kind = int if field in ("epochs", "batch_size") else float
        option = "--" + field.replace("_", "-")
        p.add_argument(option, type=kind, help=f"{text} (default: the recipe's)")
    p.add_argument("--out", default=str(ROOT / "checkpoints"), help="folder of the checkpoints")
    p.add_argument(
        "--work-dir",
        default=os.path.join("~", ".cache", "vfjax", "training"),
        help="folder in which runs keep the state that they resume from",
    )
    p.add_argument("--restart", action="store_true", help="forget saved state, begin afresh")
    p.add_argument("--overwrite", action="store_true", help="train again what is in --out already")
    return p


def recipe_name(model: str, dataset: str, preset: str) -> str:
    """Returns the recipe that a preset means for a model."""
    if model.startswith("linear"):
        return f"{preset}-linear"
    if dataset == "digits":
        return "cpu-digits"
    if dataset == "mnist":
        return "cpu-mlp" if model == "mlp" else "paper-mnist-vgg"
    if preset == "paper":
        # Where the paper says that it warms up, of its CIFAR runs.
        return "paper-cifar-warmup" if model == "resnet20-ln" else "paper-cifar"
    if model == "mlp":
        return "cpu-mlp"
    return "cpu-resnet" if model.startswith("resnet") else "cpu-vgg"


def checkpoint_name(dataset: str, model: str, width: float, seed: int) -> str:
    """Returns the folder name of a shipped model.

    Example:
      >>> checkpoint_name("cifar10", "vgg16", 0.25, 0)
      'cifar10-vgg16-w0.25-seed0'
    """
    model = model.removeprefix("digits-") if dataset == "digits" else model
    width_part = "" if width == 1.0 else f"-w{width:g}"
    return f"{dataset}-{model}{width_part}-seed{seed}"


def command(args: argparse.Namespace, seed: int) -> str:
    """Returns the command that trains exactly this model."""
    words = ["python experiments/train_edges.py", f"--model {args.model}", f"--seeds {seed}"]
    for option in ("width", "dataset", "preset", "recipe", "epochs", "learning_rate",
                   "weight_decay", "batch_size", "warmup_epochs"):
        value = getattr(args, option)
        if value != parser().get_default(option):
            words.append(f"--{option.replace('_', '-')} {value}")
    return " ".join(words)


def card(
    args: argparse.Namespace,
    model: Any,
    recipe: train.Recipe,
    dataset: data.Dataset,
    seed: int,
    trained: train.Trained,
) -> dict[str, Any]:
    """Measures the model and returns all that its card says."""
    fn = models.apply_fn(model)
    splits = {"test": None, "train": TRAIN_SUBSET}
    measured = {
        split: train.evaluate(fn, trained.variables, dataset.batches(split, samples=count))
        for split, count in splits.items()
    }
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    return {
        "model": args.model,
        "options": options,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"])),
        "dataset": dataset.name,
        "source": "scikit-learn" if dataset.name == "digits" else f"TFDS {dataset.name}",
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "seed": seed,
        **{split: result._asdict() for split, result in measured.items()},
        "recipe": dataclasses.asdict(recipe),
        "command": command(args, seed),
        "seconds": round(trained.seconds, 1),
        "device": f"{jax.default_backend()} ({os.cpu_count()} cores, {platform.machine()})"
        if jax.default_backend() == "cpu"
        else jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "date": time.strftime("%Y-%m-%d"),
        "history": trained.history,
    }


def main(argv: list[str] | None = None) -> list[Path]:
    """Trains and saves; returns the folders of the checkpoints."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for noisy in ("absl", "orbax", "jax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if args.dataset == "auto":
        args.dataset = "digits" if args.model.startswith("digits") else "cifar10"

    options: dict[str, Any] = {}
    if args.width != 1.0:
        options["width"] = args.width
    if args.dataset == "cifar100":
        options["classes"] = 100
    model = models.create(args.model, **options)
    recipe = train.RECIPES[args.recipe or recipe_name(args.model, args.dataset, args.preset)]
    changes = {
        name: value
        for name in ("epochs", "learning_rate", "weight_decay", "batch_size", "warmup_epochs")
        if (value := getattr(args, name)) is not None
    }
    recipe = dataclasses.replace(recipe, **changes)

    names = {s: checkpoint_name(args.dataset, args.model, args.width, s) for s in args.seeds}
    folders = {seed: Path(args.out).expanduser().absolute() / name for seed, name in names.items()}
    missing = [s for s in args.seeds if args.overwrite or args.restart or not folders[s].exists()]
    for seed in args.seeds:
        if seed not in missing:
            logging.info("%s is there already; --overwrite trains it again", folders[seed])
    if not missing:
        return list(folders.values())

    dataset = data.load(args.dataset, args.data_dir)
    for seed in missing:
        work_dir = Path(args.work_dir).expanduser() / names[seed]
        trained = train.fit(
            model, recipe, dataset, seed=seed, work_dir=work_dir, resume=not args.restart
        )
        meta = card(args, model, recipe, dataset, seed, trained)
        # The variables alone: momentum is of no use to who merges, and as large as the model.
        checkpoint.save(folders[seed], trained.variables, meta)
        logging.info("wrote %s: test accuracy %.4f", folders[seed], meta["test"]["accuracy"])
        shutil.rmtree(work_dir, ignore_errors=True)
    return list(folders.values())


if __name__ == "__main__":
    main()
