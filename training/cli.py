"""Command lines: options as flags, and expected errors as one line."""

import argparse
import contextlib
import dataclasses
import difflib
import json
import os
import re
import signal
import sys
from typing import NoReturn

from interop.legacy import CONFIG_RENAMES, MODEL_ARGS
from training.config import (
    PRESETS,
    RECIPES,
    Config,
    read_settings,
    rescale_for_batch_size,
)

ALIASES = CONFIG_RENAMES  # former spellings of flags stay valid, but --help does not show them
TEST_SIZE = ("test_short_side", "test_long_side")  # former spellings of the two numbers of --test-size
DATA_ARGS = {  # the arguments of layouts.load_data, which are flags of every program that reads a dataset
    "root": (
        str,
        "folder of COCO or Cityscapes, or parent of shapes [datasets/coco, datasets/cityscapes, datasets]",
    ),
    "train_json": (str, "training annotations, instead of those that are found"),
    "val_json": (str, "validation annotations, instead of those that are found"),
    "image_folder": (str, "folder of the images, instead of the one that is found"),
    "val_image_folder": (str, "folder of the validation images, if it is another one"),
    "val_ratio": (
        float,
        "share of annotated images to hold out without a validation set [0.2 of at least 20]",
    ),
    "allow_missing": (bool, "go on although more than 10 % of the images are missing"),
    "crowd_is_object": (bool, "take each annotation with iscrowd 1 as one object (CVAT's brush masks)"),
    "follow_links": (bool, "follow links that leave the image folder [true]"),
}
# Options that --settings-from does not take: those of a run's data, start and folder.
NOT_SHARED = {"data", "data_args", "unlabeled", "labeled_list", "ratio", "unannotated", "out", "device"}
NOT_SHARED |= {"hours", "init_from", "teacher_checkpoint", "student_checkpoint", "supervised_only"}
EPILOGS = {"auto": "In brackets: defaults. Preset auto chooses many options from the images and the machine."}
HINTS = {  # what other programs call things
    "--epochs": "the length is --steps, such as --steps 2000,2000,4000, or --hours 2",
    "--gpus": "start one process per GPU: torchrun --nproc_per_node=8 distill.py ...",
    "--imgsz": "the size of training crops is --crop, such as --crop 512,512",
    "--img-size": "the size of training crops is --crop, such as --crop 512,512",
    "--batch-size": "it is --batch",
    "--resume": "no flag is needed: the same command resumes an interrupted run",
    "--weights": "start from a model with --init-from, or from a backbone with --pretrained FILE",
    "--learning-rate": "it is --lr",
    "--num-workers": "it is --workers",
    "--model": "the backbone is --backbone, other arguments of the model are --model-args",
    "--project": "the folder of a run is --out",
    "--output-dir": "the folder of a run is --out",
}
METAVARS = {bool: "true|false", int: "N", float: "X", str: "TEXT", tuple: "X,X", dict: "JSON", list: "DIR"}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and suggest the closest flag."""

    def __init__(self, description, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter, **kwargs)

    def error(self, message):
        if message.startswith("unrecognized"):
            actions = [action for action in self._actions if action.help is not argparse.SUPPRESS]
            flags = [flag for action in actions for flag in action.option_strings if flag.startswith("--")]
            unknown = message.split()[2].split("=")[0]
            if unknown in HINTS:
                exit_with_error(f"there is no {unknown}: {HINTS[unknown]}")
            close = difflib.get_close_matches(unknown, flags, n=1)
            message += f"; did you mean {close[0]}?" if close else "."
            message += f" Valid flags: {' '.join(flags)}"
        exit_with_error(message)


def parse_config(argv=None, description=None) -> Config:
    """Build a Config from its defaults, then the preset or the run of --settings-from, then the flags. The
    preset is that of --preset, or of the dataset, or "auto" for a folder. Exits with one line for a wrong
    flag; Config raises ValueError for a value."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    first = Parser(None, add_help=False)  # the preset comes first, because --help shows its values
    for name in ("data", "preset", "settings-from"):
        first.add_argument(f"--{name}")
    chosen = first.parse_known_args(argv)[0]
    data = chosen.data or fields["data"].default
    preset_name = chosen.preset or (data if data in PRESETS else "auto")
    if preset_name not in PRESETS:
        exit_with_error(f"unknown preset {preset_name!r}; choose one of {', '.join(sorted(PRESETS))}")
    if chosen.settings_from and chosen.preset:
        exit_with_error("--settings-from has a preset of its own; drop --preset")
    former = read_settings(chosen.settings_from)["options"] if chosen.settings_from else {}
    former = {name: value for name, value in former.items() if name in fields.keys() - NOT_SHARED}
    preset = former or PRESETS[preset_name]
    preset_name = former.get("preset", preset_name)

    parser = Parser(
        description,
        usage="%(prog)s [options]",
        epilog=EPILOGS.get(preset_name, f"In brackets: the values of the preset {preset_name!r}."),
    )
    for name, field in fields.items():
        value = preset.get(name, field.default)
        default = f" [{format_value(value)}]" if value not in ("", None, ()) else ""
        text = (field.metadata["help"] + default).replace("%", "%%")
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        group.add_argument(
            option_flag(name), metavar=METAVARS[field.type], help=text, **_argument_type(field.type)
        )
        if name == "data":
            add_data_flags(group)
    group.add_argument(
        "--settings-from", metavar="RUN", help="take the settings of this run, not its data, start or folder"
    )
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        help="the paper's, or robust: what goes beyond the paper [robust for auto, else paper]",
    )
    group.add_argument(
        "--scale-to-batch", **_argument_type(bool), metavar=METAVARS[bool],
        help="rescale the preset's lr, steps and EMA decay to --batch",
    )  # fmt: skip
    for old, new in ALIASES.items():
        parser.add_argument(
            option_flag(old), dest=new, help=argparse.SUPPRESS, **_argument_type(fields[new].type)
        )
    for name in (*MODEL_ARGS, *TEST_SIZE):  # --hidden-dim 64 is --model-args '{"hidden_dim": 64}'
        parser.add_argument(option_flag(name), type=int, help=argparse.SUPPRESS)
    parser.add_argument("--backbone-args", type=_json, help=argparse.SUPPRESS)
    parser.add_argument("--backbone-weights", help=argparse.SUPPRESS)  # FILE, now --pretrained FILE
    flags = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    flags.pop("settings_from", None)
    if "backbone_weights" in flags:
        flags["pretrained"] = flags.pop("backbone_weights")
    scale_to_batch, recipe = flags.pop("scale_to_batch", False), flags.pop("recipe", "")
    if {"hours", "steps"} <= flags.keys() and flags["hours"]:
        exit_with_error("--hours fits --steps to a time; drop one")
    owns_images = data not in PRESETS or "unlabeled" in flags
    if owns_images and not flags.keys() & {"ratio", "labeled_list"}:
        flags["ratio"] = 1.0  # a fraction is for benchmarks, which have labels to spare
    if flags.get("supervised_only") and "finetune_steps" not in flags:
        former.pop("finetune_steps", None)

    values = dict(preset)
    if scale_to_batch and "batch" in flags:
        values |= rescale_for_batch_size(Config(**preset), flags["batch"])
    model_args = dict(preset.get("model_args") or {})
    if flags.get("backbone") not in (None, preset.get("backbone", fields["backbone"].default)):
        model_args.pop("backbone_args", None)  # they belong to the preset's backbone
    model_args |= flags.pop("model_args", {})
    for name in (*MODEL_ARGS, "backbone_args"):
        if name in flags:
            model_args[name] = flags.pop(name)
    reading = check_data_args(flags.pop("data_args", {})) | data_args(flags)
    flags = {name: value for name, value in flags.items() if name not in DATA_ARGS}
    given = [flags.pop(name, None) for name in TEST_SIZE]
    if given != [None, None]:
        before = flags.get("test_size") or preset.get("test_size") or (None, None)
        flags["test_size"] = tuple(b if side is None else side for b, side in zip(before, given))
    values |= RECIPES.get(recipe, {})
    dictionaries = {"model_args": model_args, "data_args": reading}
    cfg = Config(**{**values, **flags, **dictionaries, "preset": preset_name})
    cfg.settings_from, cfg.scale_to_batch = chosen.settings_from or "", scale_to_batch
    fitted = {"steps", "finetune_steps", "ema_decay"} if flags.get("hours") else set()
    cfg.given = frozenset(flags) | (former.keys() - fitted)
    cfg.given |= {name for name in dictionaries if dictionaries[name]} | RECIPES.get(recipe, {}).keys()
    return cfg


def add_data_flags(parser) -> None:
    """Add the flags of DATA_ARGS."""
    for name, (kind, text) in DATA_ARGS.items():
        yes_or_no = {"type": _boolean, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        parser.add_argument(
            option_flag(name), metavar=METAVARS[kind], help=text.replace("%", "%%"), **yes_or_no
        )
    parser.add_argument("--no-follow-links", dest="follow_links", action="store_false", default=None,
                        help=argparse.SUPPRESS)  # fmt: skip


def data_args(flags: dict) -> dict:
    """Return the arguments of layouts.load_data that were given as flags."""
    return {name: flags[name] for name in DATA_ARGS if flags.get(name) is not None}


def check_data_args(given: dict) -> dict:
    """Return the value of --data-args. Raises ValueError for an unknown name or a value of another type."""
    for name, value in given.items():
        if name not in DATA_ARGS:
            raise ValueError(f"--data-args: unknown name {name!r}; choose from {', '.join(DATA_ARGS)}")
        kind = DATA_ARGS[name][0]
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"--data-args: {name} must be {kind.__name__}, found {value!r}")
    return given


def option_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _argument_type(kind: type) -> dict:
    parse = {tuple: parse_numbers, bool: _boolean, dict: _json, list: str}.get(kind, kind)
    return {"type": parse, **{bool: {"nargs": "?", "const": True}, list: {"nargs": "+"}}.get(kind, {})}


def format_value(value) -> str:
    """Format an option's value as it is written on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def parse_numbers(text: str) -> tuple:
    """ "1,2.5" -> (1, 2.5)"""
    try:
        numbers = [float(part) for part in text.split(",") if part]
        return tuple(int(number) if number.is_integer() else number for number in numbers)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers separated by commas, found {text!r}") from None


def _json(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text!r} ({error})") from None


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, found {text!r}")
    return text.lower() == "true"


def answer_early(description: str | None = None) -> None:
    """Let Ctrl-C end the program quietly, and answer --help of a phase script with this description, before
    imports that take seconds."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if description and {"-h", "--help"} & set(sys.argv[1:]):
        with expected_errors():
            parse_config(description=description)


def exit_with_error(message, code: int = 2) -> NoReturn:
    """Exit with one line on stderr. Exit codes: 0 success; 1 a bug (the only case with a traceback) or
    the failure of another process; 2 an error that the user can fix; 3 gradients that stay non-finite;
    143 stopped by a signal."""
    process = f" (process {os.environ['RANK']})" if "RANK" in os.environ else ""
    print(f"error{process}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


@contextlib.contextmanager
def expected_errors(kinds=(ValueError, OSError)):
    """Turn expected errors (bad flags or files, too little memory, dead workers or peers, a model that
    torch.compile cannot trace) into a one-line message without a traceback."""
    try:
        yield
    except kinds as error:
        exit_with_error(error)
    except (RuntimeError, MemoryError) as error:
        out_of_memory = re.search(r"out of memory|can't allocate memory|not enough memory", str(error))
        if out_of_memory or isinstance(error, MemoryError):
            size = re.search(r"allocate ([\d.]+ \w+)", str(error))
            advice = "use a smaller --batch, --test-size or --crop, or more --grad-accum-steps"
            exit_with_error(f"cannot allocate {size[1] + ' of ' if size else ''}memory; {advice}")
        if re.match(r"DataLoader (worker \(pid|timed out)", str(error)):
            exit_with_error(f"cannot load data: {error}; fewer --workers need less memory")
        if re.search(r"Connection (closed|reset) by peer|Broken pipe", str(error)):
            exit_with_error("another process has failed; see its message", code=1)
        if type(error).__module__ == "torch._dynamo.exc":  # such as a timm backbone that branches on values
            reason = str(error).partition("\n")[0]
            exit_with_error(f"torch.compile cannot trace this model: {reason}; drop --compile")
        raise
