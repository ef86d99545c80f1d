r"""Trains the edge models that the experiments merge, and writes them as checkpoints with cards.

The shipped ones, each about as long as its card says:

    python experiments/train_edges.py --model vgg16 --width 0.25 --seeds 0 1 2
    python experiments/train_edges.py --model resnet20 --width 0.5 --seeds 0 1
    python experiments/train_edges.py --model vgg16-bn --width 0.125 --seeds 0 1 --epochs 14 \
        --storage float16
    python experiments/train_edges.py --model vgg16-ln --width 0.125 --seeds 0 1 --epochs 14 \
        --storage float16
    python experiments/train_edges.py --model resnet20-ln --width 0.25 --seeds 0 1 --epochs 8 \
        --learning-rate 0.02 --storage float16
    python experiments/train_edges.py --model convnext-pico --width 0.5 --seeds 0 1 --epochs 16 \
        --storage float16
    python experiments/train_edges.py --model vgg7-bn --width 0.5 --classes 0 1 2 3 4 --seeds 0 \
        --dimensions 32 --epochs 12 --storage float16
    python experiments/train_edges.py --model vgg7-bn --width 0.5 --classes 5 6 7 8 9 --seeds 1 \
        --dimensions 32 --epochs 12 --storage float16
    python experiments/train_edges.py --model digits-mlp --seeds 0 1
    python experiments/train_edges.py --model digits-conv --seeds 0 1

Rate and length of the ResNet20 with LayerNorm are what two cores had time for: at 0.1 it had not
begun to learn after three epochs, and 0.005 to 0.05 made no difference to how it began, as seen on
training images.

With `--classes` a network is trained on these alone, to point at their embeddings.

A run that is stopped, at any moment and by anything, goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _heads
import jax

from vfjax import checkpoint, data, models, train

log = logging.getLogger(__name__)

# The train accuracy on the card is of so many images, not augmented.
TRAIN_SUBSET = 10_000
# Half the bits are enough where the accuracy on these changes by no more.
ROUNDING = 0.0005
# What may be changed about a recipe.
CHANGES = {
    "epochs": (int, "passes over the training split"),
    "learning_rate": (float, "peak learning rate"),
    "weight_decay": (float, "L2 penalty of all parameters"),
    "batch_size": (int, "images per step"),
    "warmup_epochs": (float, "epochs of linear warm-up"),
}


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument(
        "--model",
        default="vgg16",
        choices=models.NAMES,
        metavar="NAME",
        help=f"architecture (default: vgg16), one of {', '.join(models.NAMES)}",
    )
    p.add_argument(
        "--width", type=float, default=1.0, help="multiplier of all channel counts (default: 1)"
    )
    p.add_argument(
        "--dataset",
        default="auto",
        choices=data.NAMES,
        help="training data (default: auto: digits for the digits models, else CIFAR-10)",
    )
    p.add_argument(
        "--data-dir", metavar="DIR", help="folder of TFDS data sets (default: TFDS_DATA_DIR)"
    )
    p.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="SEED",
        help="one model is trained for each (default: 0)",
    )
    p.add_argument(
        "--preset",
        default="cpu",
        choices=("cpu", "paper"),
        help="recipe: what two cores finish, or the paper's Table 2 (default: cpu)",
    )
    p.add_argument(
        "--recipe",
        choices=sorted(train.RECIPES),
        metavar="NAME",
        help=f"recipe by name, instead of --preset: one of {', '.join(sorted(train.RECIPES))}",
    )
    for name, (kind, text) in CHANGES.items():
        option = "--" + name.replace("_", "-")
        p.add_argument(option, type=kind, metavar="N", help=f"{text}, instead of the recipe's")
    p.add_argument(
        "--classes",
        type=int,
        nargs="+",
        metavar="CLASS",
        help="train on these classes alone, as one of several networks (default: on all)",
    )
    _heads.embedding_options(p)
    p.add_argument(
        "--storage",
        choices=("float32", "float16"),
        default="float32",
        help="how numbers are stored; in half the bits only if no more than one in 2,000 of the "
        "train images is told differently (default: float32)",
    )
    p.add_argument(
        "--out",
        default=str(_common.ROOT / "checkpoints"),
        metavar="DIR",
        help="folder of the checkpoints (default: checkpoints, beside the experiments)",
    )
    p.add_argument(
        "--work-dir",
        default="~/.cache/vfjax/training",
        metavar="DIR",
        help="where runs keep the state that they resume from (default: ~/.cache/vfjax/training)",
    )
    p.add_argument("--restart", action="store_true", help="forget saved state, begin afresh")
    p.add_argument("--overwrite", action="store_true", help="train again what is in --out already")
    return p


def checkpoint_name(
    dataset: str, model: str, width: float, seed: int, classes: Sequence[int] | None = None
) -> str:
    """Returns the folder name of a shipped model.

    Example:
        >>> checkpoint_name("cifar10", "vgg16", 0.25, 0)
        'cifar10-vgg16-w0.25-seed0'
        >>> checkpoint_name("cifar10", "vgg7-bn", 0.5, 1, range(5, 10))
        'cifar10-vgg7-bn-w0.5-classes5to9-seed1'
    """
    model = model.removeprefix("digits-") if dataset == "digits" else model
    width_part = "" if width == 1.0 else f"-w{width:g}"
    classes_part = "" if classes is None else f"-classes{_heads.named(classes)}"
    return f"{dataset}-{model}{width_part}{classes_part}-seed{seed}"


def command(args: argparse.Namespace, seed: int) -> str:
    """Returns the command that trains exactly this model."""
    words = ["python experiments/train_edges.py", f"--model {args.model}", f"--seeds {seed}"]
    for name in ("width", "dataset", "preset", "recipe", "storage", *CHANGES):
        value = getattr(args, name)
        if value != parser().get_default(name):
            words.append(f"--{name.replace('_', '-')} {value}")
    if args.classes is not None:
        words += _heads.words(args, args.classes)
    return " ".join(words)


def options_of(card: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of `models.create` that rebuild the model of a card."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in card["options"].items()}


def card(
    args: argparse.Namespace,
    model: Any,
    recipe: train.Recipe,
    dataset: data.Dataset,
    seed: int,
    trained: train.Trained,
    head: _heads.Head | None,
    described: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Measures the model; returns all that its card says, and the dtype to store it in."""
    fn, variables = models.apply_fn(model), trained.variables
    if head is not None:
        fn = _heads.Headed(fn, head)

    def measure(split: str) -> train.Evaluation:
        samples = TRAIN_SUBSET if split == "train" else None
        return train.evaluate(fn, variables, dataset.batches(split, samples=samples))

    storage, rounding = args.storage, None
    if storage != "float32":
        # Judged on training images: the test split chooses nothing.
        exact = measure("train").accuracy
        variables = jax.tree.map(lambda leaf: leaf.astype(storage).astype(leaf.dtype), variables)
        rounding = measure("train").accuracy - exact
        if abs(rounding) > ROUNDING:
            log.warning("%s would change train accuracy by %+.4f: float32", storage, rounding)
            variables, storage = trained.variables, "float32"
    measured = {split: measure(split) for split in ("test", "train")}
    options = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name")
    }
    found = {
        "model": args.model,
        "options": options,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"])),
        "dataset": dataset.name,
        "source": "scikit-learn" if dataset.name == "digits" else "TFDS",
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "seed": seed,
        **described,
        **{split: result._asdict() for split, result in measured.items()},
        "recipe": dataclasses.asdict(recipe),
        "command": command(args, seed),
        "seconds": round(trained.seconds, 1),
        "storage": {"dtype": storage, "train_accuracy_change": rounding},
        **_common.environment(),
        "history": trained.history,
    }
    return found, storage


def main(argv: list[str] | None = None) -> list[Path]:
    """Trains and saves; returns the folders of the checkpoints."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    for name in ("vfjax", __name__):
        logging.getLogger(name).setLevel(logging.INFO)
    if args.dataset == "auto":
        args.dataset = "digits" if args.model.startswith("digits") else "cifar10"

    options: dict[str, Any] = {}
    if args.width != 1.0:
        options["width"] = args.width
    classes, head, described = 100 if args.dataset == "cifar100" else 10, None, {}
    _heads.check(args, parts=args.classes is not None)
    if args.classes is not None:
        whole = _heads.head_of(args, classes)
        head = whole.of(_heads.checked(args.classes, classes))
        described = _heads.described(args, whole, args.classes)
        options["classes"] = args.dimensions
    elif classes != 10:
        options["classes"] = classes
    if args.recipe:
        recipe = train.RECIPES[args.recipe]
    else:
        recipe = train.recipe_for(args.model, args.dataset, preset=args.preset)
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    try:
        model = models.create(args.model, **options)
        recipe = dataclasses.replace(recipe, **changes)
    except ValueError as error:
        raise _common.UserError(str(error)) from error

    names = {
        seed: checkpoint_name(args.dataset, args.model, args.width, seed, args.classes)
        for seed in args.seeds
    }
    folders = {seed: Path(args.out).expanduser().absolute() / name for seed, name in names.items()}
    missing = [s for s in args.seeds if args.overwrite or args.restart or not folders[s].exists()]
    for seed in args.seeds:
        if seed not in missing:
            found = checkpoint.card(folders[seed])
            other = _heads.different(found, described, dataclasses.asdict(recipe))
            if other:
                raise _common.UserError(
                    f"{folders[seed]} is there already, trained with {', '.join(other)}: choose "
                    "another --out, or remove it, as --overwrite of train_edges.py does."
                )
            log.info("%s is there already; --overwrite trains it again", folders[seed])
    if not missing:
        return list(folders.values())

    dataset = data.load(args.dataset, args.data_dir)
    if args.classes is not None:
        dataset = _heads.only(dataset, args.classes)
    for seed in missing:
        work_dir = Path(args.work_dir).expanduser() / names[seed]
        trained = train.fit(
            model,
            recipe,
            dataset,
            seed=seed,
            logits=head,
            work_dir=work_dir,
            resume=not args.restart,
        )
        meta, storage = card(args, model, recipe, dataset, seed, trained, head, described)
        # The variables alone: momentum is of no use to who merges, and as large as the model.
        checkpoint.save(folders[seed], trained.variables, meta, storage=storage)
        log.info("wrote %s: test accuracy %.4f", folders[seed], meta["test"]["accuracy"])
        shutil.rmtree(work_dir, ignore_errors=True)
    return list(folders.values())


if __name__ == "__main__":
    with _common.reported(parser()):
        main()
