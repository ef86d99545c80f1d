"""Command lines as frozen dataclasses: an option is a field, its help the field's metadata."""

import argparse
import contextlib
import dataclasses
import os
import re
import shlex
import sys
import tempfile
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
        silent = action.default is None or isinstance(action.default, bool)
        if silent or "(default: " in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def typed(convert: Callable[[str], Any], fits: Callable[[Any], bool], wrong: str) -> Any:
    """The type of an option: what `convert` makes of a text, if that fits.

    Example:
      >>> typed(float, lambda value: value > 0, "is not above 0")("-1")
      Traceback (most recent call last):
        ...
      argparse.ArgumentTypeError: '-1' is not above 0
    """

    def convert_checked(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if fits(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")

    return convert_checked


def _whole(text: str) -> int:
    return int(text) if text.isdigit() else -1


whole = typed(_whole, lambda number: number >= 0, "is not a whole number, from 0 on")


def count_of(what: str) -> Callable[[str], int]:
    return typed(_whole, lambda count: count >= 1, f"is not a number of {what}, from 1 on")


def number_of(low: float, high: float = float("inf")) -> Callable[[str], float]:
    """The type of an option that is a finite number from `low` to `high`."""
    to = "on" if high == float("inf") else f"to {high:g}"
    wrong = f"is not a number from {low:g} {to}"
    return typed(float, lambda value: low <= value <= high and value != float("inf"), wrong)


positive = typed(float, lambda value: 0 < value < float("inf"), "is not a finite number above 0")
seed_of = typed(_whole, lambda seed: seed >= 0, "is not a seed, from 0 on")
# A number of images, or `all`; `counted` makes a number or None of it.
count_or_all = typed(
    lambda text: text if text == "all" else _whole(text),
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
    """The type of `--out`: a folder that files can be written to; what is made to try it goes.

    Example:
      >>> output_folder("/dev/null/x")
      Traceback (most recent call last):
        ...
      argparse.ArgumentTypeError: nothing can be written to '/dev/null/x': /dev/null is not a folder
    """
    text = os.path.expanduser(text)
    folder = Path(text).absolute()
    made: list[Path] = []
    try:
        for parent in reversed((folder, *folder.parents)):
            if not parent.is_dir():
                parent.mkdir()
                made.append(parent)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, FileExistsError):
            why = f"{error.filename} is not a folder"
        raise argparse.ArgumentTypeError(f"nothing can be written to {text!r}: {why}") from error
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
    return text


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
    """A field of an `Options` class: one option of the command line.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config(Options):
      ...     images: int = option(100, "test images", type=count_of("images"), part="images{}")
      >>> parse(Config, "script.py", "", ["--images", "5"]).images
      5
    """
    if presets is not None:
        shown = {name: "all" if v is None else f"{v:,}" for name, v in presets.items()}
        first, *others = shown
        rest = "".join(f"; {shown[name]} with --preset {name}" for name in others)
        help += f" (default: {shown[first]}{rest})"
    metadata = {"help": help, "presets": presets, "part": part, "usual": usual}
    return dataclasses.field(default=default, metadata=metadata | {"argument": argument})


def sized(help: str, part: str, cpu: int, paper: int | None, what: str = "images") -> Any:
    """An option that is a number of something, by default that of the preset."""
    presets = {"cpu": cpu, "paper": paper}
    return option(None, help, presets=presets, type=count_of(what), metavar="N", part=part)


def images(name: str, help: str, cpu: int, paper: int | None = None) -> Any:
    """An option of how many images there are, by preset; None for all."""
    return sized(help, name + "{}", cpu, paper)


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
    # Own options first.
    fields = {field.name: field for field in dataclasses.fields(options)}
    common = [fields.pop(f.name) for f in dataclasses.fields(Options) if f.name in fields]
    for field in (*fields.values(), *common):
        default, given = field.default, dict(field.metadata["argument"])
        if default is False:
            given["action"] = "store_true"
        elif isinstance(default, tuple):
            default = list(default)
            given.setdefault("nargs", "+")
        name = "--" + field.name.replace("_", "-")
        p.add_argument(name, default=default, help=field.metadata["help"], **given)
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


def command(script: str, argv: Sequence[str] | None) -> str:
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", f"experiments/{script}", *words])
