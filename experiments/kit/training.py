"""How edge models are trained: names, cards, and runs that go on where they were stopped."""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kit import cli, heads, records
from vfjax import checkpoint, data, models, train

log = logging.getLogger("vfjax.experiments")

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


def _change(name: str) -> Any:
    kind, text = CHANGES[name]
    return cli.option(None, f"{text}, instead of the recipe's", type=kind, metavar="N")


# fmt: off
@dataclasses.dataclass(frozen=True)
class Training(heads.EmbeddingOptions):
    """What is trained: the options of `train_edges.py`."""

    model: str = cli.option(
        "vgg16", f"architecture, one of {', '.join(models.NAMES)} (default: vgg16)",
        choices=models.NAMES, metavar="NAME")
    width: float = cli.option(1.0, "multiplier of all channel counts", type=float)
    dataset: str = cli.option(
        "auto", "training data; auto is the digits for the digits models, else CIFAR-10",
        choices=data.NAMES)
    data_dir: str | None = cli.option(
        None, "folder of TFDS data sets (default: TFDS_DATA_DIR)", metavar="DIR")
    seeds: tuple[int, ...] = cli.option(
        (0,), "one model is trained for each", type=int, metavar="SEED")
    preset: str = cli.option(
        "cpu", "recipe: what two cores finish, or the paper's Table 2", choices=("cpu", "paper"))
    recipe: str | None = cli.option(
        None, f"recipe by name, instead of --preset: one of {', '.join(sorted(train.RECIPES))}",
        choices=sorted(train.RECIPES), metavar="NAME")
    epochs: int | None = _change("epochs")
    learning_rate: float | None = _change("learning_rate")
    weight_decay: float | None = _change("weight_decay")
    batch_size: int | None = _change("batch_size")
    warmup_epochs: float | None = _change("warmup_epochs")
    classes: tuple[int, ...] | None = cli.option(
        None, "train on these classes alone, as one of several networks (default: on all)",
        type=int, nargs="+", metavar="CLASS")
    storage: str = cli.option(
        "float32", "how numbers are stored; in half the bits only if no more than one in 2,000 of "
        "the train images is classified differently", choices=("float32", "float16"))
    out: str = cli.option(
        str(records.ROOT / "checkpoints"), "folder of the checkpoints (default: checkpoints, "
        "beside the experiments)", metavar="DIR")
    work_dir: str = cli.option(
        "~/.cache/vfjax/training", "where runs keep the state that they resume from", metavar="DIR")
    restart: bool = cli.option(False, "forget saved state, begin afresh")
    overwrite: bool = cli.option(False, "train again what is in --out already")
# fmt: on


def checkpoint_name(
    dataset: str, model: str, width: float, seed: int, classes: Sequence[int] | None = None
) -> str:
    """The folder name of a shipped model.

    Example:
      >>> checkpoint_name("cifar10", "vgg16", 0.25, 0)
      'cifar10-vgg16-w0.25-seed0'
      >>> checkpoint_name("cifar10", "vgg7-bn", 0.5, 1, range(5, 10))
      'cifar10-vgg7-bn-w0.5-classes5to9-seed1'
    """
    model = model.removeprefix("digits-") if dataset == "digits" else model
    parts = [dataset, model] + ([] if width == 1.0 else [f"w{width:g}"])
    parts += [] if classes is None else [f"classes{heads.named(classes)}"]
    return "-".join([*parts, f"seed{seed}"])


def command(args: Training, seed: int, head: heads.Head | None = None) -> str:
    """The command that trains exactly this model; `head` is that of all classes, if any."""
    words = ["python experiments/train_edges.py", f"--model {args.model}", f"--seeds {seed}"]
    for name in ("width", "dataset", "preset", "recipe", "storage", *CHANGES):
        value = getattr(args, name)
        if value != getattr(Training, name):
            words.append(f"--{name.replace('_', '-')} {value}")
    if args.classes is not None and head is not None:
        words += heads.words(args, head, args.classes)
    return " ".join(words)


def options_of(card: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in card["options"].items()}


def card(
    args: Training, model: Any, dataset: data.Dataset, trained: train.Trained, head: Any
) -> tuple[dict[str, Any], str]:
    """Measures the model; returns what its card says of it, and the dtype to store it in."""
    fn, variables = models.apply_fn(model), trained.variables
    fn = fn if head is None else heads.Headed(fn, head)

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
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    found = {
        "model": args.model,
        "options": {name: getattr(model, name) for name in fields},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.variables["params"])),
        "dataset": dataset.name,
        "source": "scikit-learn" if dataset.name == "digits" else "TFDS",
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        **{split: result._asdict() for split, result in measured.items()},
        "seconds": round(trained.seconds, 1),
        "storage": {"dtype": storage, "train_accuracy_change": rounding},
        **records.environment(),
        "history": trained.history,
    }
    return found, storage


def run(args: Training) -> list[Path]:
    """Trains what the options ask for, or goes on with it; returns the folders of checkpoints."""
    if args.dataset == "auto":
        name = "digits" if args.model.startswith("digits") else "cifar10"
        args = dataclasses.replace(args, dataset=name)
    options: dict[str, Any] = {} if args.width == 1.0 else {"width": args.width}
    classes, described = 100 if args.dataset == "cifar100" else 10, {}
    head = whole = None
    heads.check(args, parts=args.classes is not None)
    if args.classes is not None:
        whole = heads.head_of(args, classes)
        head = whole.of(heads.checked(args.classes, classes))
        described = heads.described(args, whole, args.classes)
        options["classes"] = whole.dimensions
    elif classes != 10:
        options["classes"] = classes
    recipe = train.RECIPES[args.recipe] if args.recipe else None
    recipe = recipe or train.recipe_for(args.model, args.dataset, preset=args.preset)
    changes = {name: getattr(args, name) for name in CHANGES if getattr(args, name) is not None}
    try:
        model = models.create(args.model, **options)
        recipe = dataclasses.replace(recipe, **changes)
    except ValueError as error:
        raise cli.UserError(str(error)) from error

    out, named = Path(args.out).expanduser().absolute(), (args.dataset, args.model, args.width)
    folders = {seed: out / checkpoint_name(*named, seed, args.classes) for seed in args.seeds}
    missing = []
    for seed, folder in folders.items():
        if args.overwrite or args.restart or not folder.exists():
            missing.append(seed)
            continue
        other = heads.different(checkpoint.card(folder), described, dataclasses.asdict(recipe))
        if other:
            raise cli.UserError(
                f"{folder} is there already, trained with {', '.join(other)}: choose another "
                "--out, or remove it, as --overwrite of train_edges.py does."
            )
        log.info("%s is there already; --overwrite trains it again", folder)
    if not missing:
        return list(folders.values())

    dataset = data.load(args.dataset, args.data_dir)
    if args.classes is not None:
        dataset = heads.only(dataset, args.classes)
    for seed in missing:
        work_dir = Path(args.work_dir).expanduser() / folders[seed].name
        kept = {"work_dir": work_dir, "resume": not args.restart}
        trained = train.fit(model, recipe, dataset, seed=seed, logits=head, **kept)
        found, storage = card(args, model, dataset, trained, head)
        made = {"command": command(args, seed, whole), "recipe": dataclasses.asdict(recipe)}
        meta = {"seed": seed, **described, **made, **found}
        # The variables alone: momentum is of no use to who merges, and as large as the model.
        checkpoint.save(folders[seed], trained.variables, meta, storage=storage)
        log.info("wrote %s: test accuracy %.4f", folders[seed], meta["test"]["accuracy"])
        shutil.rmtree(work_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            work_dir.parent.rmdir()
    return list(folders.values())
