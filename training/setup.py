"""From a Config to data, fresh models and loss; wrong options are reported here, before training."""

import logging
import os
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import torch

from data import (
    split_hash,
    stable_seed,
)
from interop.backbone import download_pretrained, load_backbone_weights
from interop.load import load_any_checkpoint, load_partial
from layouts.validate import format_bins
from matcher import SetCriterion
from model import Mask2Former
from training.auto import choose_options, fit_steps, measure_facts, measure_step_seconds
from training.checkpoint import (
    check_same_model,
    has_checkpoints,
    load_student_checkpoint,
    load_teacher_checkpoint,
    lock,
    step_files,
)
from training.cli import expected_errors, format_value, option_flag
from training.config import PRESETS, Config, read_settings, rescale_for_batch_size
from training.distributed import (
    Env,
    all_gather_list,
    check_compiler,
    init_distributed,
    print_rank0,
    rank,
    use_bf16,
    warn_once,
    world_size,
    wrap_ddp,
)
from training.metrics import print_banner, tensorboard_writer
from training.optimization import build_optimizer, lr_multiplier
from training.run_data import Data, bins_of_run, data_warnings, read_data


def set_up(cfg: Config) -> tuple[Env, Data, SetCriterion]:
    """Join the other processes, read the data and build the loss. Raises ValueError for what a user got
    wrong."""
    env = join_processes(cfg)
    data = read_data(cfg, env)
    if rank() == 0:
        lock(Path(cfg.out))
    complete_settings(cfg, data)
    copies = cfg.teacher_checkpoint and cfg.student_from_teacher
    starts_elsewhere = cfg.init_from or cfg.student_checkpoint or copies
    if cfg.pretrained == "true" and not starts_elsewhere and not has_checkpoints(cfg.out):
        download_pretrained(cfg.backbone)  # raises if it cannot
    weights = dict(zip(("weight_class", "weight_mask", "weight_dice"), cfg.loss_weights))
    criterion = SetCriterion(
        data.num_classes, **weights, no_object_weight=cfg.no_object_weight, num_points=cfg.num_points
    )
    criterion = criterion.to(env.device)
    if cfg.hours and not has_checkpoints(cfg.out):
        fit_to_hours(cfg, data, criterion)
    return data.env, data, criterion


def join_processes(cfg: Config) -> Env:
    """Join the other processes, choose the device, and check the options that need no data. Raises
    ValueError."""
    env = init_distributed(cfg.device, cfg.precision)
    lr_multiplier(cfg.schedule, progress=0.0)  # raises for an unknown name
    if cfg.tensorboard:
        tensorboard_writer()
    if cfg.compile:
        check_compiler(env.device)
    return env


def complete_settings(cfg: Config, data: Data) -> None:
    """Choose what preset auto leaves open, and check the settings against the data. A run that has begun
    keeps its choices. Raises ValueError."""
    # Rank 0 chooses for all: GPUs may differ, and so may what a file system shows.
    choices = all_gather_list([choose_settings(cfg, data)] if rank() == 0 else [])[0]
    apply_choices(cfg, choices)
    data.env = Env(data.env.device, use_bf16(data.env.device, cfg.precision))
    if cfg.batch % world_size():
        raise ValueError(f"--batch {cfg.batch} must be a multiple of the {world_size()} processes")
    if cfg.norm == "batch" and world_size() > 1 and data.env.device.type != "cuda":
        raise ValueError("--norm batch is synchronized on GPUs only; use group or frozen on several CPUs")
    if "cutmix" in cfg.strong_view and cfg.batch == world_size() and not cfg.supervised_only:
        warn_once("CutMix does nothing: a process has one unlabeled image per step, and no other to paste")
    data.augmentation  # noqa: B018  raises for a wrong crop or scale
    check_model(cfg, data)


def choose_settings(cfg: Config, data: Data) -> dict[str, tuple]:
    """Return {option: (value, reason)}: what was chosen for a run that has begun, or what preset auto
    chooses."""
    if has_checkpoints(cfg.out) and (Path(cfg.out) / "settings.json").exists():
        former = read_settings(cfg.out)
        if former["options"]["preset"] == cfg.preset:
            return {name: (value, why) for name, (value, why) in former["choices"].items()}
    if cfg.preset != "auto" or cfg.settings_from:
        return {}
    facts = measure_facts(data.train, data.labeled, data.env.device)
    source = cfg.init_from or cfg.student_checkpoint or cfg.teacher_checkpoint
    start = load_any_checkpoint(source)["model_args"] if source else {}
    return choose_options(facts, {name: getattr(cfg, name) for name in cfg.given}, start)


def apply_choices(cfg: Config, choices: dict[str, tuple]) -> None:
    """Set the options that were chosen and that no flag overrides. Those of --model-args are merged."""
    cfg.choices = {**(cfg.choices or {}), **choices}
    options = {name: value for name, (value, _) in choices.items() if name not in cfg.given}
    if "model_args" in choices:
        options["model_args"] = {**choices["model_args"][0], **cfg.model_args}
    set_options(cfg, options)


def set_options(cfg: Config, options: dict) -> None:
    """Set options of a Config and check them as its constructor does."""
    for name, value in options.items():
        setattr(cfg, name, value)
    cfg.__post_init__()


def fit_to_hours(cfg: Config, data: Data, criterion: SetCriterion) -> None:
    """Set the steps that take --hours, as far as ten steps of a throwaway model tell."""
    model = Mask2Former(**model_arguments(cfg, data)).to(data.env.device).train()  # any weights will do
    optimizer, batches = build_optimizer(model, cfg), data.labeled_batches("teacher", 0)
    called = wrap_ddp(model, data.env, cfg.grad_accum_steps, cfg.compile)
    seconds = measure_step_seconds(called, optimizer, batches, criterion, data.env)
    reason = f"fit {cfg.hours:g} hours at {seconds:.3g} s for a step on labels, measured"
    apply_choices(cfg, {name: (value, reason) for name, value in fit_steps(cfg, seconds).items()})


def model_arguments(cfg: Config, data: Data) -> dict:
    """Return the arguments of Mask2Former, without those that load weights."""
    names = ("backbone", "norm", "num_queries")
    return {"num_classes": data.num_classes, **{name: getattr(cfg, name) for name in names}, **cfg.model_args}


def describe(cfg: Config, data: Data) -> dict:
    """Return what every checkpoint says of its model and data."""
    return {
        "model_args": model_arguments(cfg, data),
        "class_names": data.train.class_names,
        "category_ids": data.train.category_ids,
        "pixel_range": data.train.pixel_range,
        **data.hashes,
    }


def build_model(cfg: Config, data: Data, name: str) -> Mask2Former:
    """Build a fresh model: a pretrained backbone (or a random one) and random decoders, drawn from (seed,
    name); or initialized from --init-from. Nothing is downloaded for a phase that has checkpoints to resume
    from."""
    torch.manual_seed(stable_seed(cfg.seed, "model", name))
    logging.getLogger("timm").setLevel(logging.ERROR)  # It warns of weights of classifiers.
    args = model_arguments(cfg, data)
    phase = "burnin" if name == "student" else "supervised" if cfg.supervised_only else "teacher"
    with expected_errors():
        if cfg.init_from:
            model = Mask2Former(**args)
            load_partial(model, load_any_checkpoint(cfg.init_from)["model"])
        elif cfg.pretrained == "false" or step_files(cfg.out, phase):
            model = Mask2Former(**args)
        elif cfg.pretrained == "true":
            model = _pretrained_model(cfg, args)
        else:
            weights = load_backbone_weights(cfg.pretrained, cfg.backbone, args.get("backbone_args"))
            model = Mask2Former(**args, backbone_weights=weights)
    return model.to(data.env.device)


def _pretrained_model(cfg: Config, args: dict) -> Mask2Former:
    download_pretrained(cfg.backbone)
    try:
        return Mask2Former(**args, pretrained=True)
    except RuntimeError as error:
        if "state_dict" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"cannot use the pretrained weights of {cfg.backbone!r}: {reason}") from None


def check_model(cfg: Config, data: Data) -> None:
    """Raises ValueError if the options give no model, or one that does not take images of any size, or if
    backbone weights or a checkpoint do not fit."""
    args = model_arguments(cfg, data)
    _meta_model(args)
    if cfg.pretrained not in ("true", "false"):
        if not Path(cfg.pretrained).exists():
            raise ValueError(f"--pretrained must be true, false or a file, found {cfg.pretrained!r}")
        weights = load_backbone_weights(cfg.pretrained, cfg.backbone, args.get("backbone_args"))
        try:
            _meta_model({**args, "backbone_weights": weights})
        except ValueError as error:
            raise ValueError(f"--pretrained {cfg.pretrained}: {error}") from None
    names = data.train.class_names
    if cfg.teacher_checkpoint:
        teacher = load_teacher_checkpoint(cfg, names)
        if cfg.student_from_teacher:
            try:
                check_same_model(cfg.teacher_checkpoint, teacher["model_args"], args)
            except ValueError as error:
                advice = "for a fresh student pass --student-from-teacher false"
                raise ValueError(
                    f"the student cannot start as a copy of the teacher: {error}; {advice}"
                ) from None
    if cfg.student_checkpoint:
        load_student_checkpoint(cfg, names, args)
    if cfg.init_from:
        for note in load_partial(Mask2Former(**args), load_any_checkpoint(cfg.init_from)["model"]):
            print_rank0(f"--init-from {cfg.init_from}: {note}")


def _meta_model(args: dict) -> Mask2Former:
    """Build the model without memory for its parameters."""
    try:
        with torch.device("meta"):
            return Mask2Former(**args)
    except (TypeError, RuntimeError, IndexError, AssertionError) as error:
        raise ValueError(f"--model-args: {error}") from None


def print_setup(cfg: Config, data: Data, last_phase: int) -> None:
    """Print the banner of a run that ends with phase 2 or 3, and warnings."""
    phases = dict(zip(("teacher burn-in", "guided burn-in", "distillation"), cfg.steps[:last_phase]))
    if cfg.teacher_checkpoint or cfg.student_checkpoint:
        del phases["teacher burn-in"]
    if cfg.student_checkpoint:
        del phases["guided burn-in"]
    if cfg.finetune_steps and last_phase == 3:
        phases["fine-tuning"] = cfg.finetune_steps
    if cfg.supervised_only:
        phases = {"supervised training": sum(cfg.steps)}
    unlabeled = "" if cfg.supervised_only else f"and {cfg.batch} unlabeled "
    batch = f"{cfg.batch} labeled {unlabeled}images per step, lr {cfg.lr:.3g}"
    reference = Config(**PRESETS.get(cfg.preset, {}))
    if cfg.batch != reference.batch and not cfg.scale_to_batch and cfg.preset != "auto":
        scaled = rescale_for_batch_size(reference, cfg.batch)
        scaled = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in scaled.items()}
        flags = ", ".join(f"--{name.replace('_', '-')} {format_value(v)}" for name, v in scaled.items())
        batch += f", the preset is for {reference.batch}, --scale-to-batch would set {flags}"
    parameters = sum(p.numel() for p in _meta_model(model_arguments(cfg, data)).parameters())
    pool = [f"{count:,} of {folder}" for folder, count in data.folder_counts.items()]
    pool = {"unlabeled": f"the training images, {', '.join(pool)}"} if pool else {}
    bins = {"labels": format_bins(bins_of_run(data), one_line=True)}
    print_banner(
        cfg.out,
        f"Guided Distillation on {cfg.data} -> {cfg.out}",
        data.env,
        data=f"{len(data.train):,} training images, {len(data.labeled):,} of them labeled (split "
        f"{split_hash(data.labeled)}), {len(data.unlabeled.image_ids):,} in the unlabeled pool, "
        f"{len(data.val or ()):,} for validation, {data.num_classes} classes",
        **pool,
        **bins,
        model=f"Mask2Former, {cfg.backbone}, {cfg.num_queries} queries, {parameters / 1e6:.1f} million "
        "parameters",
        batch=batch,
        steps=", ".join(f"{steps:,} {name}" for name, steps in phases.items()),
    )
    for line in choice_lines(cfg):
        print_rank0(line)
    if cfg.reasons:
        print_rank0(f"  the same as flags: {command_with_choices(cfg)}")
    for warning in data_warnings(cfg, data):
        print_rank0(f"warning: {warning}")


def choice_lines(cfg: Config) -> Iterator[str]:
    """Yield one line for each option that preset auto has chosen, with its reason."""
    if cfg.reasons:
        yield "  chosen from the images and the machine; a flag overrides a choice:"
    for name, reason in cfg.reasons.items():
        flag = f"{option_flag(name)} {format_value(getattr(cfg, name))}"
        yield textwrap.fill(f"{flag}  ({reason})", 100, initial_indent="    ", subsequent_indent="      ")


def command_with_choices(cfg: Config) -> str:
    """Return the command of this run, with a flag for each option that preset auto has chosen."""
    words = [f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"] if world_size() > 1 else []
    words = ["torchrun" if words else "python", *words, Path(sys.argv[0]).name, *sys.argv[1:]]
    for name in (name for name in cfg.reasons if name != "hours"):
        words += [option_flag(name), format_value(getattr(cfg, name))]
    words += ["--hours", "0"] if cfg.hours else []  # the steps are not fitted again
    return shlex.join(words)
