"""From a Config to data, fresh models and loss; wrong options and annotations are reported here, before
training."""

import shlex
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data import (
    Augmentation,
    AugmentedDataset,
    CocoDataset,
    UnlabeledImages,
    endless_batches,
    labeled_split,
    labels_hash,
    repeat_factors,
    shortest_edge_size,
    split_from_file,
    split_hash,
    stable_seed,
)
from interop.load import load_any_checkpoint, load_partial
from layouts import load_data
from layouts.cityscapes import is_cityscapes, official_evaluation
from layouts.images import find_unlabeled, inspect_images
from layouts.validate import format_bins
from matcher import SetCriterion
from model import Mask2Former
from training.auto import choose_options, fit_steps, measure_facts, measure_step_seconds
from training.checkpoint import has_checkpoints, load_student_checkpoint, load_teacher_checkpoint, lock
from training.cli import expected_errors, format_value, option_flag
from training.config import PRESETS, Config, read_settings, rescale_for_batch_size, write_settings
from training.distributed import (
    Env,
    init_distributed,
    print_rank0,
    rank,
    rank0_first,
    use_bf16,
    world_size,
)
from training.metrics import print_banner, tensorboard_writer
from training.optimization import build_optimizer, lr_multiplier

LOADER_TIMEOUT = 300.0  # seconds without a batch after which a loader process counts as stuck


@dataclass
class Data:
    """The data of a run: datasets, labeled image ids, the unlabeled pool (every training image, the
    labeled ones too, and those of --unlabeled: {folder: number} in folder_counts). val may be None. notes are
    about image files that are left out or look wrong; with any of the errors, no run starts."""

    cfg: Config
    env: Env
    train: CocoDataset
    val: CocoDataset | None
    labeled: list
    unlabeled: UnlabeledImages
    folder_counts: dict[str, int]
    notes: list[str]
    errors: list[str]

    @property
    def augmentation(self) -> Augmentation:
        cfg = self.cfg
        return Augmentation(
            cfg.crop, cfg.lsj_scale, cfg.short_sides, color_jitter=cfg.color_jitter, blur=cfg.blur
        )

    @property
    def hashes(self) -> dict:
        """Return what identifies the labeled images and their objects."""
        return {"split": split_hash(self.labeled), "labels": labels_hash(self.train, self.labeled)}

    @property
    def num_classes(self) -> int:
        return len(self.train.class_names)

    def labeled_batches(self, phase: str, first_step: int, uniform: bool = False) -> Iterator[dict]:
        """Return endless batches {"image", "targets", "file"} from a step on. Images with rare classes
        are repeated (data.repeat_factors), unless `uniform`."""
        threshold = 0 if uniform else self.cfg.repeat_threshold
        repeats = repeat_factors(self.train, self.labeled, threshold) if threshold else None
        views = AugmentedDataset(self.train, self.augmentation)
        return self._batches(views, self.labeled, (phase, "labeled"), first_step, repeats=repeats)

    def unlabeled_batches(self, phase: str, first_step: int) -> Iterator[dict]:
        """Return endless batches {"image", "strong", "file"}: weak and strong views of the same crops. With
        --strong-view false the strong view is the weak one."""
        views = AugmentedDataset(self.unlabeled, self.augmentation, labels=False, strong=self.cfg.strong_view)
        for batch in self._batches(views, self.unlabeled.image_ids, (phase, "unlabeled"), first_step):
            yield {"strong": batch["image"], **batch}  # the weak view, if the batch has no strong one

    def _batches(self, views, image_ids, key: tuple, first_step: int, **kwargs):
        return endless_batches(
            views,
            image_ids,
            batch_size=self.cfg.batch // world_size(),
            seed=stable_seed(self.cfg.seed, *key),
            rank=rank(),
            world_size=world_size(),
            num_workers=self.cfg.workers,
            timeout=LOADER_TIMEOUT,
            first_step=first_step,
            pin_memory=self.env.device.type == "cuda",
            **kwargs,
        )


def set_up(cfg: Config) -> tuple[Env, Data, SetCriterion]:
    """Join the other processes, read the data and build the loss. Raises ValueError for what a user got
    wrong."""
    data = read_data(cfg, join_processes(cfg))
    if rank() == 0:
        lock(Path(cfg.out))
    complete_settings(cfg, data)
    weights = dict(zip(("weight_class", "weight_mask", "weight_dice"), cfg.loss_weights))
    criterion = SetCriterion(
        data.num_classes, **weights, no_object_weight=cfg.no_object_weight, num_points=cfg.num_points
    )
    criterion = criterion.to(data.env.device)
    if cfg.hours and not has_checkpoints(cfg.out):
        fit_to_hours(cfg, data, criterion)
    if rank() == 0:
        write_settings(cfg)
    return data.env, data, criterion


def join_processes(cfg: Config) -> Env:
    """Join the other processes, choose the device, and check the options that need no data. Raises
    ValueError."""
    env = init_distributed(cfg.device, cfg.precision)
    if cfg.batch % world_size():
        raise ValueError(f"--batch {cfg.batch} must be a multiple of the {world_size()} processes")
    if cfg.norm == "batch" and world_size() > 1 and env.device.type != "cuda":
        raise ValueError("--norm batch is synchronized on GPUs only; use group or frozen on several CPUs")
    lr_multiplier(cfg.schedule, progress=0.0)  # raises for an unknown name
    if cfg.tensorboard:
        tensorboard_writer()
    return env


def complete_settings(cfg: Config, data: Data) -> None:
    """Let preset auto choose, and check the settings against the data. Raises ValueError."""
    if cfg.preset == "auto":
        choose_settings(cfg, data)
    data.augmentation  # noqa: B018  raises for a wrong crop or scale
    check_model(cfg, data)


def choose_settings(cfg: Config, data: Data) -> None:
    """Fill in what preset auto chooses, and the reasons. A run that has begun keeps its settings."""
    if has_checkpoints(cfg.out) and (Path(cfg.out) / "settings.json").exists():
        former = read_settings(cfg.out)
        choices = {name: (former["options"][name], why) for name, why in (former["reasons"] or {}).items()}
    else:
        num_unlabeled = len(data.unlabeled.image_ids) - len(data.labeled)
        facts = measure_facts(data.train, data.labeled, num_unlabeled, data.env.device)
        choices = choose_options(facts, {name: getattr(cfg, name) for name in cfg.given})
    choices = {name: choice for name, choice in choices.items() if name not in cfg.given - {"model_args"}}
    set_options(cfg, {name: value for name, (value, _) in choices.items()})
    cfg.reasons = {name: why for name, (_, why) in choices.items()}
    data.env = Env(data.env.device, use_bf16(data.env.device, cfg.precision))


def set_options(cfg: Config, options: dict) -> None:
    """Set options of a Config and check them as its constructor does."""
    for name, value in options.items():
        setattr(cfg, name, value)
    cfg.__post_init__()


def fit_to_hours(cfg: Config, data: Data, criterion: SetCriterion) -> None:
    """Set the steps that take --hours, as far as ten steps of a throwaway model tell."""
    model = build_model(cfg, data, "teacher").train()
    batches = data.labeled_batches("teacher", 0)
    seconds = measure_step_seconds(model, build_optimizer(model, cfg), batches, criterion, data.env)
    fitted = fit_steps(cfg, seconds)
    set_options(cfg, fitted)
    reason = f"fit {cfg.hours:g} hours at {seconds:.3g} s for a step on labels, measured"
    cfg.reasons = {**(cfg.reasons or {}), **dict.fromkeys(fitted, reason)}


def read_data(cfg: Config, env: Env) -> Data:
    """Read the datasets and choose the labeled images. Rank 0 reads first, as it may have to write files."""
    with rank0_first():
        train, val = load_data(cfg.data, **cfg.data_args)
    print_rank0(f"{cfg.data}: {train.layout}")
    with rank0_first():  # the other ranks then read from the page cache
        data = select_data(cfg, env, train, val)
    if data.errors:
        raise ValueError(data.errors[0])
    return data


def select_data(cfg: Config, env: Env, train: CocoDataset, val: CocoDataset | None) -> Data:
    """Look at the image files, choose the labeled images and find the unlabeled ones. Raises ValueError."""
    notes, errors = inspect(train, val)
    labeled = choose_labeled(cfg, train)
    if is_cityscapes(val):
        official_evaluation()  # raises if cityscapesscripts is not installed
    paths, counts, left_out = find_unlabeled(cfg.unlabeled or (), train, val)
    unlabeled = UnlabeledImages(train, paths)
    notes += left_out + inspect_unlabeled(unlabeled)
    return Data(cfg, env, train, val, labeled, unlabeled, counts, notes, errors)


def choose_labeled(cfg: Config, train: CocoDataset) -> list:
    """Choose the labeled images. Without another choice all are labeled if some have no annotations and
    count as unlabeled. Raises ValueError."""
    candidates = train.image_ids
    if unannotated_are_unlabeled(cfg):
        candidates = [image_id for image_id in train.image_ids if train.annotations(image_id)]
        if len(candidates) < len(train) and not cfg.given & {"ratio", "labeled_list"}:
            cfg.ratio = 1.0  # the unlabeled images are there already
            cfg.out = cfg.out if "out" in cfg.given else cfg.default_out()
    if cfg.labeled_list:
        labeled = split_from_file(cfg.labeled_list, train)
    else:
        labeled = labeled_split(candidates, cfg.ratio, cfg.seed)
    if not any(map(train.labels, labeled)):
        bins = format_bins(train.bins, one_line=True)
        raise ValueError(f"{train.json_file}: no labeled image has an object; {bins}")
    return labeled


def inspect(train: CocoDataset, val: CocoDataset | None) -> tuple[list[str], list[str]]:
    """Look at the headers of the images, and set how the datasets read them. Returns notes about the images,
    and errors."""
    notes, errors = [], []
    for kind, dataset in (("training", train), ("validation", val)):
        if dataset:
            found = inspect_images(dataset)
            dataset.pixel_range = found.pixel_range if dataset is train else train.pixel_range
            dataset.exif_stored = found.exif_stored
            notes += found.notes
            too_many = too_many_unreadable(kind, found.unreadable, len(dataset))
            errors += too_many
            notes += [] if too_many else [f"{e}; another image takes its place" for e in found.unreadable]
    return notes, errors


def too_many_unreadable(kind: str, unreadable: list[str], total: int) -> list[str]:
    """Return an error, or nothing if a run can do without these images: it replaces one image, or 1 % of
    them, but no validation image."""
    limit = 0 if kind == "validation" else max(1, total / 100)
    if len(unreadable) <= limit:
        return []
    return [f"{len(unreadable)} {kind} images cannot be read, such as: {unreadable[0]}"]


def inspect_unlabeled(unlabeled: UnlabeledImages) -> list[str]:
    """Look at the headers of some of the images of --unlabeled. Returns notes about them."""
    train = unlabeled.dataset
    pool = inspect_images(unlabeled, unlabeled.image_ids[len(train) :], max_images=200)
    notes, pixel_range = pool.notes, train.pixel_range or (0, 65535)
    if pool.pixel_range and pool.pixel_range != pixel_range:
        notes.append(
            f"unlabeled images have values in {pool.pixel_range}; they are read with the range of the "
            f"labeled ones, {pixel_range}"
        )
    if pool.unreadable:
        example = pool.unreadable[0]
        notes.append(
            f"{len(pool.unreadable)} of up to 200 sampled unlabeled images cannot be read, such as: {example}"
        )
    return notes


def unannotated_are_unlabeled(cfg: Config) -> bool:
    """Return whether images without annotations are unlabeled, not images without objects."""
    return (cfg.unannotated or ("unlabeled" if cfg.preset == "auto" else "background")) == "unlabeled"


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
    name); or initialized from --init-from."""
    torch.manual_seed(stable_seed(cfg.seed, "model", name))
    args = model_arguments(cfg, data)
    with expected_errors():
        if cfg.init_from:
            model = Mask2Former(**args)
            load_partial(model, load_any_checkpoint(cfg.init_from)["model"])
        else:
            weights = cfg.backbone_weights or None
            model = Mask2Former(**args, pretrained=cfg.pretrained, backbone_weights=weights)
    return model.to(data.env.device)


def check_model(cfg: Config, data: Data) -> None:
    """Raises ValueError if the options give no model, or one that does not take images of any size, or if a
    checkpoint to start from does not fit."""
    if cfg.backbone_weights and not Path(cfg.backbone_weights).is_file():
        raise ValueError(f"no file --backbone-weights {cfg.backbone_weights!r}")
    args = model_arguments(cfg, data)
    model = _meta_model(args)
    H, W = (side + 32 for side in cfg.crop)  # another size than the crop, as test images have
    try:
        model.backbone(torch.empty(1, 3, H, W, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--backbone {cfg.backbone} takes no images of {H} x {W}: {error}") from None
    names = data.train.class_names
    if cfg.teacher_checkpoint:
        load_teacher_checkpoint(cfg, names)
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
    except (TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"--model-args: {error}") from None


def print_setup(cfg: Config, data: Data, last_phase: int) -> None:
    """Print the banner of a run that ends with phase 2 or 3, and warnings."""
    phases = dict(zip(("teacher burn-in", "guided burn-in", "distillation"), cfg.steps[:last_phase]))
    if cfg.teacher_checkpoint or cfg.student_checkpoint:
        del phases["teacher burn-in"]
    if cfg.student_checkpoint:
        del phases["guided burn-in"]
    if cfg.finetune_steps:
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
        print_rank0(f"  the same without choices: python {command_without_choices(cfg)}")
    for warning in data_warnings(cfg, data):
        print_rank0(f"warning: {warning}")


def bins_of_run(data: Data) -> dict[str, int]:
    """Return what becomes of each annotation of the training file in this run."""
    labeled = sum(len(data.train.objects(image_id)) for image_id in data.labeled)
    crowds = sum(len(data.train.annotations(image_id)) for image_id in data.labeled) - labeled
    in_training = sum(len(data.train.annotations(image_id)) for image_id in data.train.image_ids)
    bins = dict(data.train.bins)
    kept = bins.pop("trained") + bins.pop("crowd", 0)
    bins = {
        "trained": labeled,
        "crowd": crowds,
        "of unlabeled images": in_training - labeled - crowds,
        "of images held out for validation": kept - in_training,
        **bins,
    }
    return {bin: number for bin, number in bins.items() if number or bin == "trained"}


def choice_lines(cfg: Config) -> Iterator[str]:
    """Yield one line for each option that preset auto has chosen, with its reason."""
    if cfg.reasons:
        yield "  chosen from the images and the machine; a flag overrides a choice:"
    for name, reason in (cfg.reasons or {}).items():
        flag = f"{option_flag(name)} {format_value(getattr(cfg, name))}"
        yield textwrap.fill(f"{flag}  ({reason})", 100, initial_indent="    ", subsequent_indent="      ")


def command_without_choices(cfg: Config) -> str:
    """Return the command of this run, with a flag for each option that preset auto has chosen."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for name in cfg.reasons:
        # With 0 hours the steps are not fitted again.
        words += [option_flag(name), format_value(0 if name == "hours" else getattr(cfg, name))]
    return shlex.join(words)


def data_warnings(cfg: Config, data: Data) -> Iterator[str]:
    """Yield what training can handle, but the owner of the data should know."""
    train, val = data.train, data.val
    if val is None:
        yield f"{cfg.data} has no validation set, so no AP will be shown; --val-json names one"
    for dataset in (train, val):
        yield from (f"{dataset.json_file}: {note}" for note in (() if dataset is None else dataset.notes))
    yield from data.notes
    count = sum(not train.annotations(image_id) for image_id in train.image_ids)
    if count and unannotated_are_unlabeled(cfg):
        yield (
            f"{count} images without annotations are unlabeled; if they show no object, pass "
            "--unannotated background"
        )
    elif count > len(train) / 20:
        yield (
            f"{count} of {len(train)} training images have no annotation and count as images without "
            "objects; if nobody has annotated them yet, pass --unannotated unlabeled"
        )
    unused = bins_of_run(data).get("of unlabeled images", 0)
    if cfg.preset == "auto" and unused and not cfg.given & {"ratio", "labeled_list"}:
        yield f"{unused} annotations are not used as labels; --ratio 1 uses all"
    labels = [train.labels(image_id) for image_id in data.labeled]
    missing = set(range(data.num_classes)) - {label for image in labels for label in image}
    if missing:
        names = ", ".join(train.class_names[label] for label in sorted(missing)[:10])
        yield (
            f"{len(missing)} classes are in no labeled image: {names}; they cannot be learned, unless "
            "--ratio or --labeled-list adds images with them"
        )
    if len(data.labeled) < cfg.batch:
        yield f"a batch has {cfg.batch} images, but only {len(data.labeled)} are labeled"
    empty = sum(not image for image in labels)
    if empty > len(labels) / 2:
        yield f"{empty} of {len(labels)} labeled images have no object"
    most = max(map(len, labels))
    if most > cfg.num_queries:
        yield f"an image has {most} objects, the model {cfg.num_queries} queries; pass --num-queries {most}"
    unseen = []  # validation images whose scale at test time does not occur in training
    for H, W in map(val.size, val.image_ids) if val else ():
        scale = shortest_edge_size(H, W, *cfg.test_size)[0] / H
        low, high = data.augmentation.scale_range(H, W)
        unseen += [(H, W, scale, low, high)] if not 0.99 * low <= scale <= 1.01 * high else []
    if unseen and len(unseen) > len(val) / 2:
        H, W, scale, low, high = unseen[0]
        flag = "--short-sides" if cfg.short_sides else "--lsj-scale"
        yield (
            f"an image of {H} x {W} is resized by {scale:.3g} at test time, in training by {low:.3g} to "
            f"{high:.3g}; --test-size changes the former, {flag} the latter"
        )
