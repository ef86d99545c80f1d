"""How edge models are trained: names, cards, and runs that go on where they were stopped."""

import contextlib
import dataclasses
import logging
import shlex
import shutil
from collections.abc import Mapping
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
# Options that make no other network.
PLACES = ("out", "work_dir", "restart", "overwrite")


def _change(kind: Any, text: str) -> Any:
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
    epochs: int | None = _change(cli.count_of("epochs"), "passes over the training split")
    learning_rate: float | None = _change(cli.positive, "peak learning rate")
    weight_decay: float | None = _change(cli.number_of(0), "L2 penalty of all parameters")
    batch_size: int | None = _change(cli.count_of("images"), "images per step")
    warmup_epochs: float | None = _change(cli.number_of(0), "epochs of linear warm-up")
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


def checkpoint_name(args: Training, seed: int | str) -> str:
    """The folder name of a model.

    Example:
      >>> checkpoint_name(Training(dataset="cifar10", width=0.25), 0)
      'cifar10-vgg16-w0.25-seed0'
      >>> checkpoint_name(Training(dataset="digits", model="digits-mlp", classes=(5, 6, 7)), 1)
      'digits-mlp-classes5to7-seed1'
    """
    digits = args.dataset == "digits"
    parts = [args.dataset, args.model.removeprefix("digits-") if digits else args.model]
    parts += [] if args.width == 1 else [f"w{args.width:g}"]
    if args.classes is not None:
        first, last = args.classes[0], args.classes[-1]
        run = args.classes == tuple(range(first, last + 1))
        parts.append("classes" + (f"{first}to{last}" if run else "-".join(map(str, args.classes))))
    return "-".join([*parts, f"seed{seed}"])


def command(args: Training) -> str:
    """The command that trains exactly these models, wherever they are written."""
    words = ["python", "experiments/train_edges.py"]
    for field in dataclasses.fields(Training):
        value, always = getattr(args, field.name), field.name in ("model", "seeds")
        if always or (value != field.default and field.name not in PLACES):
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    return shlex.join(words)


def model_of(name: str, width: float, classes: int) -> Any:
    try:
        return models.create(name, classes=classes, **({} if width == 1 else {"width": width}))
    except ValueError as error:
        raise cli.UserError(str(error)) from error


def different(card: Mapping[str, Any], asked: Mapping[str, Any], of: str = "") -> list[str]:
    """What a network is unlike what is asked for in, by its card: as "recipe epochs 10, not 20"."""
    found = []
    # What only one of two knows belongs to another loss, or to another version's recipe.
    for key in [key for key in asked if key in card]:
        if isinstance(asked[key], Mapping):
            found += different(card[key], asked[key], f"{key} ")
        elif card[key] != asked[key]:
            found.append(f"{of}{key} {card[key]}, not {asked[key]}")
    return found


def asked_of(args: Training) -> tuple[int, heads.Head | None, dict[str, Any]]:
    """The number of outputs of the networks, their heads, if any, and what cards say of these."""
    outputs = 100 if args.dataset == "cifar100" else 10
    heads.check(args)
    if args.classes is None:
        return outputs, None, {}
    if len({*args.classes} & {*range(outputs)}) < max(2, len(args.classes)):
        wanted = f"--classes must be two or more different ones from 0 to {outputs - 1}"
        raise cli.UserError(f"{wanted}, got {' '.join(map(str, args.classes))}")
    whole = heads.head_of(args, outputs)
    told = {"classes": args.classes} | heads.described(args, whole)
    return whole.dimensions, whole.of(args.classes), told


def there(folders: Mapping[int, Path], asked: Mapping[str, Any], otherwise: str) -> list[int]:
    """The seeds that have a checkpoint; raises if one is of another head or recipe than asked."""
    found = [seed for seed, folder in folders.items() if folder.exists()]
    for folder in (folders[seed] for seed in found):
        if other := different(checkpoint.card(folder), records.finite(asked)):
            raise cli.UserError(f"{folder} was trained with {', '.join(other)}: {otherwise}.")
    return found


def shipped(args: Training) -> list[Path]:
    """Finds shipped models; without seeds all there are."""
    folder, stem = records.ROOT / "checkpoints", checkpoint_name(args, "")
    numbers = [path.name.removeprefix(stem) for path in folder.glob(f"{stem}*")]
    seeds = args.seeds or sorted(int(number) for number in numbers if number.isdigit()) or [0]
    folders = {seed: folder / f"{stem}{seed}" for seed in seeds}
    found = there(folders, asked_of(args)[-1], "--retrain trains others")
    if missing := tuple(seed for seed in seeds if seed not in found):
        kinds = sorted({path.name.rpartition("-seed")[0] for path in folder.glob("[!.]*-seed*")})
        raise cli.UserError(
            f"{len(seeds)} models {stem}* are needed in {folder.name}/, {len(found)} found. To "
            f"train what is missing: {command(dataclasses.replace(args, seeds=missing))} "
            f"(--retrain trains all {len(seeds)} into --out). Or choose among what {folder.name}/ "
            f"has: {', '.join(kinds) or 'none'}."
        )
    return list(folders.values())


def card(
    args: Training, model: Any, dataset: data.Dataset, trained: train.Trained, head: Any
) -> dict[str, Any]:
    """Measures the model, as it is stored; returns what its card says of it."""
    plain, storage = models.apply_fn(model), args.storage
    fn = plain if head is None else lambda variables, x: head(plain(variables, x))

    def measure(variables: Any, split: str) -> train.Evaluation:
        samples = TRAIN_SUBSET if split == "train" else None
        return train.evaluate(fn, variables, dataset.batches(split, samples=samples))

    exact = trained.variables
    rounded = jax.tree.map(lambda leaf: leaf.astype(args.storage).astype(leaf.dtype), exact)
    trees = {"float32": exact, storage: rounded}
    # Judged on training images: the test split chooses nothing.
    found = {dtype: measure(tree, "train") for dtype, tree in trees.items()}
    change = found[storage].accuracy - found["float32"].accuracy
    if abs(change) > ROUNDING:
        log.warning("%s would change train accuracy by %+.4f: float32", storage, change)
        storage = "float32"
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    return {
        "model": args.model,
        "options": {name: getattr(model, name) for name in fields},
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(exact["params"])),
        "dataset": dataset.name,
        "source": "scikit-learn" if dataset.name == "digits" else "TFDS",
        "normalisation": {"mean": dataset.mean, "std": dataset.std},
        "test": measure(trees[storage], "test")._asdict(),
        "train": found[storage]._asdict(),
        "seconds": round(trained.seconds, 1),
        "storage": {"dtype": storage, "train_accuracy_change": change},
        **records.environment(),
        "history": trained.history,
    }


def run(args: Training) -> list[Path]:
    """Trains what the options ask for, or goes on with it; returns the folders of checkpoints."""
    if args.dataset == "auto":
        name = "digits" if args.model.startswith("digits") else "cifar10"
        args = dataclasses.replace(args, dataset=name)
    outputs, head, asked = asked_of(args)
    model = model_of(args.model, args.width, outputs)
    usual = train.recipe_for(args.model, args.dataset, preset=args.preset)
    recipe = train.RECIPES[args.recipe] if args.recipe else usual
    known = {field.name for field in dataclasses.fields(recipe)}
    changes = {k: v for k, v in vars(args).items() if k in known and v is not None}
    recipe = dataclasses.replace(recipe, **changes)
    asked["recipe"] = dataclasses.asdict(recipe)

    out = Path(args.out).expanduser().absolute()
    folders = {seed: out / checkpoint_name(args, seed) for seed in args.seeds}
    missing, otherwise = dict(folders), "choose another --out, or --overwrite it"
    if not (args.overwrite or args.restart):
        for seed in there(folders, asked, otherwise):
            log.info("%s is there already; --overwrite trains it again", missing.pop(seed))
    if not missing:
        return list(folders.values())

    dataset = data.load(args.dataset, args.data_dir)
    dataset = dataset if args.classes is None else heads.only(dataset, args.classes)
    for seed, folder in missing.items():
        work_dir = Path(args.work_dir).expanduser() / folder.name
        kept = {"work_dir": work_dir, "resume": not args.restart}
        trained = train.fit(model, recipe, dataset, seed=seed, logits=head, **kept)
        same = command(dataclasses.replace(args, seeds=(seed,), data_dir=None))
        meta = {"seed": seed, **asked, "command": same}
        meta |= card(args, model, dataset, trained, head)
        # The variables alone: momentum is of no use to who merges, and as large as the model.
        checkpoint.save(folder, trained.variables, meta, storage=meta["storage"]["dtype"])
        log.info("wrote %s: test accuracy %.4f", folder, meta["test"]["accuracy"])
        shutil.rmtree(work_dir, ignore_errors=True)
        with contextlib.suppress(OSError):
            work_dir.parent.rmdir()
    return list(folders.values())
