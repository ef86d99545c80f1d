"""Command lines as frozen dataclasses: an option is a field, its help the field's metadata."""

import argparse
import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vfjax import models

ROOT = Path(__file__).resolve().parents[2]
Config = TypeVar("Config", bound="Options")


class UserError(ValueError):
    """Something that whoever runs the script can put right; shown without a traceback."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults and keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # A default of None or False says nothing; where it means something, the text says what.
        silent = action.default is None or action.default is False
        told = silent or "(default: " in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class InOrder(argparse.Action):
    """Of several values each once: as choices are ordered, or numbers, with a word after them."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        place = self.choices.index if self.choices else lambda one: (isinstance(one, str), one)
        setattr(namespace, self.dest, sorted(set(values), key=place))


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def typed(convert: Callable[[str], Any], fits: Callable[[Any], bool], wrong: str) -> Any:
    """The type of an option: what `convert` makes of a text, if that fits; else what is wrong."""

    def convert_checked(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")

    return convert_checked


whole = typed(int, lambda number: number >= 0, "is not a whole number, from 0 on")


def count_of(what: str) -> Callable[[str], int]:
    return typed(int, lambda count: count >= 1, f"is not a number of {what}, from 1 on")


def number_of(low: float, high: float = math.inf) -> Callable[[str], float]:
    """The type of an option that is a finite number from `low` to `high`."""
    wrong = f"is not a number from {low:g} {'on' if high == math.inf else f'to {high:g}'}"
    return typed(float, lambda value: low <= value <= high and value < math.inf, wrong)


positive = typed(float, lambda value: 0 < value < math.inf, "is not a finite number above 0")
seed_of = typed(int, lambda seed: seed >= 0, "is not a seed, from 0 on")
# A number of images, or `all`; `counted` makes a number or None of it.
count_or_all = typed(
    lambda text: text if text == "all" else int(text),
    lambda count: count == "all" or count >= 1,
    "is neither a number of images nor 'all'",
)


def counted(value: int | str | None) -> int | None:
    """A number of images as `vfjax.data` takes it: None for all."""
    return None if value == "all" else value  # type: ignore[return-value]


def model_of(text: str) -> tuple[str, float | None]:
    """The type of `--model`: a name, and the width if it has one."""
    name, _, width = text.partition("-w")
    if name not in models.NAMES or (width and not re.fullmatch(r"\d*\.?\d+", width)):
        known = f"{', '.join(models.NAMES)}, with -wFRACTION after it for another width"
        raise argparse.ArgumentTypeError(f"{text!r} is not a model; take one of {known}")
    return name, float(width) if width else None


def output_folder(text: str) -> str:
    """The type of `--out`: a folder that there is or that can be made, and written to."""
    folder = Path(text).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        why = "may not be written to" if there.is_dir() else "is not a folder"
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r}: {there} {why}")
    return os.path.expanduser(text)


def option(
    default: Any = None,  # A tuple makes an option of several values, False one without a value.
    help: str = "",  # The default is said after it.
    *,
    # Instead of `default`, one for each `--preset`; None stands for all there are.
    presets: dict[str, Any] | None = None,
    # How names of files show what is not the default (or `usual`, where that depends on the
    # record): a format, or a function of the record that gives the text, or None for none.
    part: str | Callable[[Any], str | None] | None = None,
    usual: Callable[[Any], Any] | None = None,
    **argument: Any,  # As of `argparse`: type, choices, metavar, nargs.
) -> Any:
    """A field of an `Options` class: one option of the command line."""
    if presets is not None:
        shown = {name: "all" if v is None else f"{v:,}" for name, v in presets.items()}
        first, *others = shown
        rest = "".join(f"; {shown[name]} with --preset {name}" for name in others)
        help += f" (default: {shown[first]}{rest})"
    metadata = {"help": help, "presets": presets, "part": part, "usual": usual}
    return dataclasses.field(default=default, metadata=metadata | {"argument": argument})


def sized(help: str, part: str, cpu: int, paper: int | None, what: str = "images") -> Any:
    """An option that is a number of something, by default that of the preset; None for all."""
    presets = {"cpu": cpu, "paper": paper}
    return option(None, help, presets=presets, type=count_of(what), metavar="N", part=part)


def images(name: str, help: str, cpu: int) -> Any:
    """An option of how many images there are, all with the preset `paper`."""
    return sized(help, name + "{}", cpu, None)


# fmt: off
@dataclasses.dataclass(frozen=True)
class Options:
    """The options that all experiments have."""

    data_dir: str | None = option(
        None, "folder of TFDS data sets (default: TFDS_DATA_DIR, then TFDS's own default)")
    out: str = option(
        str(ROOT / "results"), "folder that the JSON record, the PNG and the page are written to; "
        "what a run that was stopped has measured waits there, too", type=output_folder)
# fmt: on


def parser(options: type, prog: str, doc: str | None) -> Parser:
    p = Parser(prog=prog, usage=f"{prog} [options]", description=doc, formatter_class=Help)
    common = {field.name for field in dataclasses.fields(Options)}
    # Own options first.
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name in common):
        given = {"default": field.default, "help": field.metadata["help"]}
        if field.default is False:
            given["action"] = "store_true"
        elif isinstance(field.default, tuple):
            given |= {"default": list(field.default), "nargs": "+"}
        given |= field.metadata["argument"]
        p.add_argument("--" + field.name.replace("_", "-"), **given)
    return p


def parse(
    options: type[Config], prog: str, doc: str | None, argv: Sequence[str] | None = None
) -> Config:
    """The options of a command line, with the defaults of the preset filled in."""
    return settled(options, vars(parser(options, prog, doc).parse_args(argv)))


def settled(options: type[Config], values: dict[str, Any]) -> Config:
    """Options of some values; lists become tuples, and defaults by preset are filled in."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}
    return options(**defaults(options, values) | given)


def defaults(options: type[Options], config: dict[str, Any]) -> dict[str, Any]:
    """The default of each option, of a record's preset where there are several."""
    presets = {field: field.metadata["presets"] for field in dataclasses.fields(options)}
    return {f.name: p[config["preset"]] if p else f.default for f, p in presets.items()}
