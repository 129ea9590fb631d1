"""From a Config to data, fresh models, loss and streams of images; what is said of them at the start; and
which phases are done already.

`parse` makes a Config (burnin.py, distill.py) of preset and flags, `Setting` all that follows from it. What
a user got wrong is found here, before anything is trained."""

import dataclasses
from pathlib import Path

import torch

import cityscapes
import engine
from checkpoints import load_checkpoint, lock, newest
from data import (
    Pool,
    View,
    Views,
    labelled_split,
    listed_split,
    load_data,
    repeat_factors,
    seed_of,
    split_hash,
    stream,
    test_size,
)
from engine import say
from evaluate import check_classes, evaluate, is_cityscapes, pictures
from flags import parse_config, shown, user_errors
from matcher import SetCriterion
from model import Mask2Former
from weights import initialise, read_weights


def parse(config_class, presets: dict, argv=None, description=None):
    """A Config from preset and flags, and with --scale-to-batch from what of the preset fits --batch."""
    cfg = parse_config(config_class, presets, argv, description)
    if not cfg.scale_to_batch:
        return cfg
    reference = config_class(**presets[cfg.preset])
    presets = {**presets, cfg.preset: presets[cfg.preset] | scaled_to_batch(reference, cfg.batch)}
    return parse_config(config_class, presets, argv, description)


def scaled_to_batch(reference, batch: int) -> dict:
    """The numbers with which another batch learns about the same. With k times the images in a step: 1/k of
    the steps, as many images in all; lr * sqrt(k), because the noise of Adam's steps falls with sqrt(k)
    (Malladi et al., NeurIPS 2022, arXiv 2205.10287); and the EMA's decay ** k, so that the teacher is as many
    images behind the student (Busbridge et al., NeurIPS 2023, arXiv 2307.13813)."""
    k = batch / reference.batch
    steps = tuple(max(1, round(number / k)) for number in reference.steps)
    ema = {"ema_decay": reference.ema_decay**k} if hasattr(reference, "ema_decay") else {}
    return {"lr": reference.lr * k**0.5, "steps": steps, **ema}


GUIDED = 2.5  # a step of phases 2 and 3 takes about so many times as long as one of phase 1: for "time left"


class Setting:
    """Data, model arguments and loss of a run: what all phases share. last: the last phase of the program.
    Raises ValueError for what a user got wrong, before anything is trained."""

    def __init__(self, cfg, last: str = "burnin"):
        self.cfg, self.last = cfg, last
        self.device = engine.start_processes(cfg.device, cfg.precision)
        if cfg.batch % engine.world_size():
            raise ValueError(f"--batch {cfg.batch} does not divide by {engine.world_size()} processes")
        if cfg.norm == "batch" and engine.world_size() > 1 and self.device.type != "cuda":
            raise ValueError(
                "--norm batch is synchronised on GPUs only; on several CPUs take group or frozen"
            )
        self.view = View(cfg.crop, cfg.scale, cfg.short_side, colour=cfg.colour, blur=cfg.blur)
        self._read_data()
        self._plan_model()
        weights = dict(zip(("weight_class", "weight_mask", "weight_dice"), cfg.loss_weights))
        self.criterion = SetCriterion(
            self.num_classes, **weights, no_object_weight=cfg.no_object_weight, num_points=cfg.num_points
        ).to(self.device)
        self.test_sizes = {"short_side": cfg.test_short_side, "long_side": cfg.test_long_side}
        engine.lr_factor(cfg.schedule, progress=0.0)
        refined = ["refine"] if cfg.refine else []
        self.finished = {  # read once: checkpoints are large
            phase: finished(cfg, phase, self.describe["split"])
            for phase in ("teacher", "burnin", "distill", *refined, "labels_only")
        }
        engine.check_alike(sum(self.finished.values()), "finished phases, in number", self.device)
        if cfg.teacher:
            load_teacher(cfg, self)  # a wrong file is refused before anything is trained
        if cfg.tensorboard:
            engine.tensorboard_writer()

    def _read_data(self) -> None:
        """Which images there are, which of them are labelled, and which are the unlabelled pool."""
        cfg = self.cfg
        with engine.rank_zero_first():
            files = dict(train_json=cfg.train_json, val_json=cfg.val_json, images=cfg.image_folder)
            self.train, self.val = load_data(cfg.data, cfg.root or None, **files)
            if engine.rank() == 0:
                lock(Path(cfg.out))
        names = self.train.class_names
        if self.val and self.val.class_names != names:
            raise ValueError(f"training has the classes {names}, validation {self.val.class_names}")
        if cfg.split:
            self.labelled = listed_split(cfg.split, self.train)
        else:
            self.labelled = labelled_split(self.train.image_ids, cfg.ratio, cfg.seed)
        if not any(map(self.train.labels, self.labelled)):
            dropped = self.train.dropped
            why = f"; {len(dropped)} annotations are left out, such as: {dropped[0]}" if dropped else ""
            raise ValueError(f"{self.train.json_file}: no labelled image has an object{why}")
        self.pool = Pool(self.train, cfg.unlabelled or (), known=[self.train, self.val])
        if is_cityscapes(self.val):
            cityscapes.rules()
        self.num_classes = len(names)

    def _plan_model(self) -> None:
        """The arguments of every fresh model, what checkpoints say of them, and whether they make one."""
        cfg = self.cfg
        if cfg.backbone_weights and not Path(cfg.backbone_weights).is_file():
            raise ValueError(f"no file --backbone-weights {cfg.backbone_weights!r}")
        fields = "backbone backbone_args norm num_queries hidden_dim"
        fields += " encoder_layers encoder_ffn decoder_layers decoder_ffn"
        self.model_args = {name: getattr(cfg, name) for name in fields.split()} | {
            "num_classes": self.num_classes,
            "pixel_mean": list(cfg.pixel_mean) or None,
            "pixel_std": list(cfg.pixel_std) or None,
        }
        self.describe = {
            "model_args": self.model_args,
            "class_names": self.train.class_names,
            "category_ids": self.train.category_ids,
            "split": split_hash(self.labelled),
        }
        try:
            with torch.device("meta"):
                model = Mask2Former(**self.model_args)
        except TypeError as error:
            raise ValueError(f"--backbone-args {cfg.backbone_args}: {error}") from None
        H, W = (side + 32 for side in cfg.crop)  # any other size: images at test time have many
        try:
            model.backbone(torch.empty(1, 3, H, W, device="meta"))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"--backbone {cfg.backbone} takes no images of {H} x {W}: {error}") from None
        self.init = read_weights(cfg.init)["student"] if cfg.init else None
        if self.init:
            for note in initialise(Mask2Former(**self.model_args), self.init):
                say(f"--init {cfg.init}: {note}")
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def show(self, presets: dict) -> None:
        """The start banner, and warnings. presets: those of the program."""
        cfg = self.cfg
        phases = list(zip(cfg.steps, ("teacher burn-in", "guided burn-in", "distillation")))
        first = 2 if cfg.student else 1 if cfg.teacher else 0
        phases = phases[first : 3 if self.last == "distill" else 2]
        phases += [(cfg.refine, "refinement")] if cfg.refine else []
        steps = ", ".join(f"{number:,} {phase}" for number, phase in phases)
        unlabelled = "" if cfg.labels_only else f"and {cfg.batch} unlabelled "
        batch = f"{cfg.batch} labelled {unlabelled}images a step, lr {cfg.lr:.3g}"
        reference = type(cfg)(**presets[cfg.preset])
        if cfg.batch != reference.batch and not cfg.scale_to_batch:
            fitting = scaled_to_batch(reference, cfg.batch)
            fitting = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in fitting.items()}
            new = ", ".join(f"--{name.replace('_', '-')} {shown(v)}" for name, v in fitting.items())
            batch += f", the preset is for {reference.batch}, --scale-to-batch would take {new}"
        engine.banner(
            cfg.out,
            f"Guided Distillation on {cfg.data} -> {cfg.out}",
            self.device,
            data=f"{len(self.train):,} training images, {len(self.labelled):,} of them labelled (split "
            f"{self.describe['split']}), {len(self.pool.image_ids):,} in the unlabelled pool, "
            f"{len(self.val or ()):,} for validation, {self.num_classes} classes",
            model=f"Mask2Former, {cfg.backbone}, {cfg.num_queries} queries, {self.num_parameters / 1e6:.1f} "
            "million parameters",
            batch=batch,
            steps=f"{sum(cfg.steps):,} on labels only" if cfg.labels_only else steps,
        )
        for warning in self.warnings():
            say(f"warning: {warning}")

    def later(self, phase: str) -> float:
        """The work of the phases after this one, in its own steps."""
        _, burnin, distill = self.cfg.steps
        distill *= self.last == "distill"
        refine = self.cfg.refine / GUIDED
        work = {
            "teacher": GUIDED * (burnin + distill + refine),
            "burnin": distill + refine,
            "distill": refine,
        }
        return work.get(phase, 0)

    def warnings(self):
        """What training can do with but its owner would want to know."""
        if not self.val:
            yield f"{self.cfg.data} has no validation set, so no AP will be shown"
        for dataset in (self.train, self.val):
            if dataset and dataset.dropped:
                first, number = dataset.dropped[0], len(dataset.dropped)
                yield f"{dataset.json_file}: {number} annotations are left out, such as: {first}"
        labels = [self.train.labels(image_id) for image_id in self.labelled]
        without = set(range(self.num_classes)) - {label for image in labels for label in image}
        if without:
            names = ", ".join(self.train.class_names[label] for label in sorted(without)[:10])
            yield f"{len(without)} classes are in no labelled image: {names}"
        if len(self.labelled) < self.cfg.batch:
            yield f"a batch has {self.cfg.batch} images, but only {len(self.labelled)} are labelled"
        empty = sum(not image for image in labels)
        if empty > len(labels) / 2:
            yield f"{empty} of {len(labels)} labelled images have no object"
        if max(map(len, labels)) > self.cfg.num_queries:
            yield f"an image has {max(map(len, labels))} objects, the model {self.cfg.num_queries} queries"
        strange = []  # images whose size at test time is none that training has
        for H, W in map(self.val.size, self.val.image_ids) if self.val else ():
            now, (low, high) = test_size(H, W, **self.test_sizes)[0] / H, self.view.factors(H, W)
            strange += [(H, W, now, low, high)] if not 0.99 * low <= now <= 1.01 * high else []
        if strange and len(strange) > len(self.val) / 2:
            H, W, now, low, high = strange[0]
            in_training = "--short-side" if self.cfg.short_side else "--scale"
            yield (
                f"an image of {H} x {W} is resized by {now:.3g} at test time, in training by {low:.3g} to "
                f"{high:.3g}; --test-short-side and --test-long-side change the former, {in_training} the "
                "latter"
            )

    def fresh_model(self, name: str) -> Mask2Former:
        """ImageNet backbone (or random), random decoders, drawn from (seed, name); or what --init has."""
        torch.manual_seed(seed_of(self.cfg.seed, "model", name))
        pretrained, weights = self.cfg.pretrained and not self.init, self.cfg.backbone_weights or None
        with user_errors():
            model = Mask2Former(**self.model_args, pretrained=pretrained, backbone_weights=weights)
        if self.init:
            initialise(model, self.init)
        return model.to(self.device)

    def labelled_stream(self, phase: str, first_step: int, repeats=None):
        """Endless batches of labelled images. repeats: how often each is seen, default alike."""
        views = Views(self.train, self.view)
        return self._stream(views, self.labelled, phase, "labelled", first_step, repeats=repeats)

    def both_streams(self, phase: str, first_step: int):
        """Of phases 2 and 3: endless batches of labelled images, where those with rare classes come more
        often, and of unlabelled ones. The unlabelled pool is every training image, the labelled ones too."""
        threshold = self.cfg.repeat_threshold
        repeats = repeat_factors(self.train, self.labelled, threshold) if threshold else None
        views = Views(self.pool, self.view, labels=False, strong=self.cfg.strong_view)
        return (
            self.labelled_stream(phase, first_step, repeats),
            self._stream(views, self.pool.image_ids, phase, "unlabelled", first_step),
        )

    def _stream(self, views, image_ids, phase, name, first_step, **sampling):
        return stream(
            views,
            image_ids,
            batch=self.cfg.batch // engine.world_size(),
            seed=seed_of(self.cfg.seed, phase, name),
            rank=engine.rank(),
            world_size=engine.world_size(),
            workers=self.cfg.workers,
            timeout=self.cfg.loader_timeout,
            first_step=first_step,
            pin_memory=self.device.type == "cuda",
            **sampling,
        )

    def evaluate(self, model) -> dict:
        if not self.val:
            return {}
        batch = max(1, self.cfg.batch // engine.world_size())
        return evaluate(model, self.val, self.device, batch=batch, **self.test_sizes)

    def pictures(self, models: dict) -> list[list]:
        return pictures(models, self.val, self.device, **self.test_sizes)


def load_teacher(cfg, setting) -> dict:
    """The checkpoint whose "student" is the teacher of phase 2: that of phase 1, or one's own, any model that
    knows the classes."""
    checkpoint = read_weights(cfg.teacher) if cfg.teacher else load_checkpoint(Path(cfg.out) / "teacher.pt")
    check_classes(checkpoint, setting.train.class_names)
    return checkpoint


# What may differ between a run and the one that goes on from its checkpoints.
BOOKKEEPING = {"root", "out", "preset", "workers", "device", "labels_only", "loader_timeout", "keep"}
BOOKKEEPING |= {"accumulate", "log_every", "save_every", "eval_every", "tensorboard", "scale_to_batch"}


def finished(cfg, phase: str, split: str) -> bool:
    """Whether out/<phase>.pt is there. Raises ValueError if it, or what is left of a run cut short, was made
    with other settings or other labelled images. split: their hash, which is compared in place of the name
    of a file of --split."""
    final = Path(cfg.out) / f"{phase}.pt"
    may_differ = BOOKKEEPING | ({"refine"} if phase != "refine" else set())  # a later phase may be added
    try:
        whole = load_checkpoint(final) if final.exists() else None
    except ValueError as error:
        raise ValueError(f"{error}; remove it to run its phase again") from None
    for path, checkpoint in ((final, whole), newest(cfg.out, phase, engine.warn)):
        if checkpoint:
            before = checkpoint["config"] | {"split": checkpoint.get("split")}
            now = dataclasses.asdict(cfg)
            del now["split"]
            now["split"] = split  # last: it follows from other flags, which say more
            for name in now:
                if name in before.keys() - may_differ and before[name] != now[name]:
                    change = f"{name} {before[name]!r}, now {now[name]!r}"
                    advice = "remove it to refine anew" if phase == "refine" else "choose another --out"
                    raise ValueError(f"{path} was made with other settings ({change}); {advice}")
    return final.exists()
