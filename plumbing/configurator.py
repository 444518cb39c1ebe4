"""The settings of a script: defaults of its dataclass, then a preset (TOML), then --key=value.

    python train.py --help                                   # every setting with its default
    python train.py config/demo.toml --max_steps=200         # a preset, and what differs from it
    python inheritune.py config/demo.toml --baselines random "random, twice the steps"

tyro makes the command line from the dataclass and checks it. A preset's keys become options before
the user's, so tyro checks them too and the last one wins. [inheritune] is for inheritune.py only.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import signal
import sys
import tomllib
import typing
from pathlib import Path

import tyro
from tqdm import tqdm


class UserError(Exception):
    """Something that the user can fix, in one line: what was found, what was expected, what to do.

    exit_code 2: bad input or configuration. 1: a failure at run time. Above 128: stopped by a signal.
    """

    def __init__(self, message: str, exit_code: int = 2):
        super().__init__(message)
        self.exit_code = exit_code


def say(text: str):
    """Print without breaking a progress bar. A full disk under a redirected log ends no run."""
    with contextlib.suppress(OSError):
        tqdm.write(text)


def run(main):
    """Call main(). A UserError is printed as one line on stderr and becomes the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 prints ? for ±
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(error if error.exit_code > 128 else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (RuntimeError, ImportError) as error:
        compiler = type(error).__module__.startswith(("torch._inductor", "torch._dynamo"))
        if "out of memory" in str(error) or "allocate memory" in str(error):  # CUDA; CPU
            remedy = "lower --micro_batch"
        elif compiler or "too short" in str(error):  # a kill can leave half a kernel
            remedy = "set --compile=False, or remove TORCHINDUCTOR_CACHE_DIR, /tmp/torchinductor_* by default"
        else:
            raise
        print(f"error: {' '.join(str(error).split())[:200]}; {remedy}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full or failing disk, no permission: nothing is damaged
        try:
            sys.stdout.flush()  # what was printed so far
        except OSError:  # the output itself fails, and Python flushes again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `| head` does
            sys.exit(128 + signal.SIGPIPE)
        print(f"error: {error.filename or 'the output'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)


def may_change(default):
    """A field of a settings dataclass that may differ on resume: it changes nothing that is learned."""
    return dataclasses.field(default=default, metadata={"may_change": True})


def check_key(key: str, known, where: str):
    """Raise UserError with the nearest known key if `key` is not one of `known`."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {'; '.join(sorted(known))}"
        raise UserError(f"{where}: unknown key {key!r}; {hint}")


def preset_options(path: Path, known) -> list[str]:
    """The settings in a preset as options: those at its top, then the running script's."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path}: not a readable preset: {error}") from None
    scripts = {key: value for key, value in table.items() if isinstance(value, dict)}
    for name in scripts:
        check_key(name, [file.stem for file in Path(__file__).parent.parent.glob("*.py")], str(path))
    settings = {key: value for key, value in table.items() if key not in scripts}
    settings |= scripts.get(Path(sys.argv[0]).stem, {})
    options = []
    for key, value in settings.items():
        check_key(key, known, str(path))
        options += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return options


def load(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls` from its defaults, a preset (a first argument *.toml) and options.

    Raises UserError for a bad preset, nan or inf. tyro itself exits with 2 for an option that does not fit.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints = typing.get_type_hints(cls)
    preset = preset_options(Path(argv.pop(0)), hints) if argv and argv[0].endswith(".toml") else []
    for i, option in enumerate(argv):
        hint = hints.get(option.removeprefix("--"))
        is_switch = bool in (hint, *typing.get_args(hint)) or True in typing.get_args(hint)
        following = argv[i + 1] if i + 1 < len(argv) else "--"
        if is_switch and following.startswith("--"):  # --resume alone means --resume=True
            argv[i] += "=True"
    found = tyro.cli(cls, args=preset + argv, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    for key, value in vars(found).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}, expected a finite number")
    return found
