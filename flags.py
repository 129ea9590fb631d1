"""Flags from the fields of a dataclass, and errors of one line. Imports nothing of ours."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import sys


def knob(default, help: str, least: float = 0, most: float = math.inf, group: str = ""):
    """A field of a Config: its default, a sentence with unit and reason, which --help shows, and the range of
    its numbers. group: the heading in --help under which it stands with those that follow."""
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most), "group": group})


def check_ranges(cfg) -> None:
    """Raises ValueError for a number of a Config that is not in its range, or infinite."""
    for field in dataclasses.fields(cfg):
        value, (least, most) = getattr(cfg, field.name), field.metadata["range"]
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, (int, float)) and not (least <= number <= most and abs(number) < math.inf):
                limits = f"at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
                raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, found {number}")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, description, **more):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, **more)

    def error(self, message):
        if message.startswith("unrecognized"):
            flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
            near = difflib.get_close_matches(message.split()[2].split("=")[0], flags, n=1)
            message += f"; did you mean {near[0]}?" if near else "."
            message += f" Valid flags: {' '.join(flags)}"
        refuse(message)


def parse_config(config_class, presets: dict, argv=None, description=None):
    """A config_class from its defaults, then the preset, then the flags.

    config_class: a dataclass of `knob`s, each of which is a flag, the first with a group; "data" and "preset"
    are two of them. presets: {name: {field: value}}. The preset is the one that --preset names, or that of
    the data set, or "coco" for a folder of one's own."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    first = Parser(None, add_help=False)  # the preset comes first: --help shows its values
    for name in ("data", "preset"):
        first.add_argument(f"--{name}")
    chosen = first.parse_known_args(argv)[0]
    data = chosen.data or fields["data"].default
    preset = chosen.preset or (data if data in presets else "coco")
    if preset not in presets:
        refuse(f"unknown preset {preset!r}: one of {', '.join(presets)}")
    parser = Parser(description, epilog=f"In brackets: the values of the preset {preset!r}.")
    for name, field in fields.items():
        kind = {tuple: _values, bool: _boolean, dict: _json, list: str}.get(field.type, field.type)
        more = {bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(field.type, {})
        value = presets[preset].get(name, field.default)
        default = f" [{shown(value)}]" if value not in ("", None, ()) else ""
        text = (field.metadata["help"] + default).replace("%", "%%")
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        group.add_argument("--" + name.replace("_", "-"), type=kind, metavar="", help=text, **more)
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return config_class(**{**presets[preset], **flags, "preset": preset})


def shown(value) -> str:
    """As it is written in a command."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _values(text: str) -> tuple:
    """ "1,2.5" -> (1, 2.5)"""
    try:
        numbers = [float(part) for part in text.split(",") if part]
        return tuple(int(number) if number.is_integer() else number for number in numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between, found {text!r}") from None


def _json(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"an object in JSON, found {text!r} ({error})") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, found {text!r}")
    return text.lower() == "true"


def refuse(message, code: int = 2) -> None:
    """Ends the program with one line. Exit codes: 0 done; 1 a bug, which alone shows a traceback, or another
    process ended first; 2 what a user can put right; 3 losses that stay infinite or NaN; 143 a signal."""
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"error{process}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def user_errors(kinds=(ValueError, OSError)):
    """Around what reads a user's flags and files: an error of these kinds there is theirs to put right, not a
    bug. Nor is the end of another process, or of one that loads data."""
    try:
        yield
    except kinds as error:
        refuse(error)
    except RuntimeError as error:
        if re.match(r"DataLoader (worker \(pid|timed out)", str(error)):
            advice = "fewer --workers need less memory, --loader-timeout is for slow disks"
            refuse(f"loading data: {error}; {advice}")
        if re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error)):
            refuse("another process has ended, see its message", code=1)
        raise
