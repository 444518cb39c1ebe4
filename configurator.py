"""Settings of a script: dataclass defaults < TOML preset < --key=value, each typed and checked.

    python train.py --help                                   # every setting with its default
    python train.py config/demo.toml --max_steps=200         # a preset, and what differs from it
    python train.py config/demo.toml --compile=False --lr=1e-3

A script's settings are one dataclass. tyro makes the command line of it; typeguard checks the preset. A preset's
table belongs to the script of its name ([inheritune]), so that the scripts of one experiment can share the rest.
"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import signal
import sys
import tomllib
import typing
from pathlib import Path

import typeguard
import tyro


class UserError(Exception):
    """Something the user can mend, in one line: what was found, what was expected, what to do.

    exit_code 2: bad input or configuration. exit_code 1: a failure at run time. Above 128: stopped by a signal.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def run(main):
    """Call main(); end a UserError as one line on stderr and its exit code, never as a traceback."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(error if error.exit_code > 128 else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # nobody reads what is printed any more, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be printed at the end
        sys.exit(128 + signal.SIGPIPE)


def check_key(key: str, known, where: str):
    """Raise UserError, naming the nearest known key, if a key is not one of `known`."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")


def from_table(cls, table: dict, where: str):
    """A dataclass from a TOML table: unknown keys and wrong types are UserErrors. Lists of tables nest."""
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in table.items():
        check_key(key, hints, where)
        inner = next(iter(typing.get_args(hints[key])), None)  # list[Arm] -> Arm
        if isinstance(value, list) and dataclasses.is_dataclass(inner):
            tables = [item if isinstance(item, dict) else {"": item} for item in value]  # no table: an unknown key
            value = [from_table(inner, item, f"{where}: {key}[{i}]") for i, item in enumerate(tables)]
        try:
            if isinstance(value, bool) and hints[key] in (int, float):
                raise typeguard.TypeCheckError("bool is not a number")
            typeguard.check_type(value, hints[key])
        except typeguard.TypeCheckError as error:
            raise UserError(f"{where}: {key} = {value!r}: {' '.join(str(error).split())}") from None
        values[key] = value
    try:
        return cls(**values)
    except TypeError as error:  # a key without a default is missing
        raise UserError(f"{where}: {str(error).split('__init__() ')[-1]}") from None


def own_settings(table: dict, path: Path) -> dict:
    """The settings in a preset that the running script reads: those at its top and those in its own table."""
    shared = {key: value for key, value in table.items() if not isinstance(value, dict)}
    scripts = {key: value for key, value in table.items() if isinstance(value, dict)}
    files = Path(__file__).parent.glob("*.py")
    known = [file.stem for file in files if "configurator.load(" in file.read_text(encoding="utf-8")]
    for name in scripts:
        check_key(name, known, str(path))
    return shared | scripts.get(Path(sys.argv[0]).stem, {})


def load(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from its defaults, a preset and the options in argv.

    A first argument that ends in .toml is the preset. Raises UserError.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    preset = {}
    if argv and argv[0].endswith(".toml"):
        path = Path(argv.pop(0))
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UserError(f"{path}: not a readable preset: {error}") from None
        preset = {"default": from_table(cls, own_settings(table, path), str(path))}
    hints = typing.get_type_hints(cls)
    for i, option in enumerate(argv):
        if option.startswith("--") and option != "--help":
            key = option[2:].split("=")[0].replace("-", "_")
            check_key(key, hints, Path(sys.argv[0]).name)
            switch = hints[key] is bool or True in typing.get_args(hints[key])
            if switch and "=" not in option and (i + 1 == len(argv) or argv[i + 1].startswith("--")):
                argv[i] += "=True"  # --resume alone means --resume=True
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls, args=argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,), **preset)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        # tyro draws a box of several lines around its message: keep the text before the first rule
        text = re.split(r"─{5,}\s*│|╰", stderr.getvalue().split("╮", 1)[-1])[0]
        raise UserError(f"{Path(sys.argv[0]).name}: {' '.join(text.replace('│', ' ').split())}") from None
