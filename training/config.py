"""The options of a run: one dataclass, and its presets. Every option is a flag of burnin.py and
distill.py."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from interop.legacy import current_options


def option(default, help: str, min: float = 0, max: float = math.inf, group: str = ""):
    """Declare an option: its default, its help text, and the range of its numbers. `group` starts a
    heading in --help, which also holds the options that follow."""
    metadata = {"help": help, "range": (min, max), "group": group}
    return dataclasses.field(default=default, metadata=metadata)


STRONG_VIEW = ("color", "noise", "erase", "turn", "cutmix")  # data.strong_view, training.robust.mix_views


@dataclass
class Config:
    """Training configuration. Defaults follow the paper's COCO ResNet-50 recipe, except the two burn-in
    lengths. Presets override defaults, flags override both. The strong view's strengths, except blur, are in
    data.strong_view."""

    ratio: float = option(
        0.1,
        "labeled fraction of the training images, in (0, 1]; 1 by default with --unlabeled",
        group="method",
    )
    labeled_list: str = option("", "file with one labeled image per line; replaces --ratio")
    steps: tuple = option((25_000, 25_000, 343_750), "steps of teacher burn-in, guided burn-in, distillation")
    score_threshold: float = option(0.7, "keep predictions with more than this class probability", max=1)
    min_area: float = option(
        5, "keep masks with more than this many pixels at stride 4; below 1: than this share of the crop"
    )
    unsupervised_weight: float = option(2.0, "weight of the loss on unlabeled images")
    ema_decay: float = option(0.9996, "decay of the EMA teacher per step, phase 3", max=1)
    strong_view: str = option(
        "color", "changes of the strong view: color (the paper's), noise, erase, turn, cutmix; false: none"
    )
    blur: tuple = option((0.1, 2.0), "range of the strong view's Gaussian blur sigma, pixels")
    repeat_threshold: float = option(10.0, "repeat-factor sampling of labeled images; 0: uniform sampling")
    seed: int = option(0, "seed of the labeled split, initial weights, views and sampled points")

    mask_nms_iou: float = option(
        1.0, "IoU threshold of mask NMS on pseudo-labels; 1 disables it", max=1, group="beyond the paper"
    )
    full_res_masks: bool = option(False, "pseudo-label masks at full resolution instead of stride 4")
    student_from_teacher: bool = option(False, "the student of phase 2 starts as a copy of the teacher")
    finetune_steps: int = option(0, "steps of a last phase on labels only at a tenth of --lr (CAST); 0: none")
    supervised_only: bool = option(
        False, "supervised baseline: labels only, for the steps of all three phases"
    )

    data: str = option("shapes", "shapes, coco, cityscapes, or a folder (docs/DATA.md)", group="data")
    data_args: dict = option(None, "arguments of layouts.load_data as JSON; each is a flag of its own too")
    unlabeled: list = option(None, "folders of additional unlabeled images, searched recursively")
    unannotated: str = option(
        "", "images without annotations are background or unlabeled; default: unlabeled in a folder"
    )
    crop: tuple = option((1024, 1024), "height and width of training crops, multiples of 32")
    lsj_scale: tuple = option((0.1, 2.0), "large-scale jitter: image size relative to fitting the crop")
    short_sides: tuple = option((), "resize the shorter side to one of these instead of jitter, pixels")
    tile: int = option(0, "train and test on windows of N x N pixels, for small objects; 0: whole images")
    color_jitter: bool = option(False, "photometric jitter of the weak view (the Cityscapes recipe)")
    test_size: tuple = option((), "shorter side and limit of the longer side at test time; 0: no resizing")
    workers: int = option(4, "loader processes for each of the two streams; 0: load in the training process")

    backbone: str = option(
        "resnet50", "swin_l, dinov3_b, ... (model.BACKBONES) or a timm model", group="model"
    )
    pretrained: str = option(
        "true",
        "the backbone's weights: true (timm's, downloaded), false (random) or a file (docs/RUNNING.md)",
    )
    norm: str = option("frozen", "the backbone's batch norm: frozen, batch (trained, synced) or group")
    num_queries: int = option(0, "maximum number of objects per image; 0: 100, or 200 with swin_l")
    model_args: dict = option(None, 'other arguments of Mask2Former as JSON, such as {"hidden_dim": 64}')
    init_from: str = option("", "checkpoint to initialize every fresh model: ours, official, Hugging Face")
    teacher_checkpoint: str = option("", "use this checkpoint's model as the teacher; skips phase 1")
    student_checkpoint: str = option("", "use this burnt-in student; skips phases 1 and 2")

    num_points: int = option(12544, "points per mask in matching and loss", min=1, group="loss")
    loss_weights: tuple = option((2.0, 5.0, 5.0), "weights of class, mask BCE and dice, in matching and loss")
    no_object_weight: float = option(0.1, 'weight of the class "no object" in the class loss')

    batch: int = option(
        16, "labeled images per step over all GPUs, and as many unlabeled", 1, group="optimizer"
    )
    lr: float = option(1e-4, "learning rate of AdamW")
    schedule: str = option("step", "poly (power 0.9), step (x 0.1 at 89 and 96 %) or cosine (5 % warmup)")
    weight_decay: float = option(0.05, "weight decay, except norms, embeddings and position tables")
    backbone_lr_factor: float = option(0.1, "learning rate of the backbone, relative to --lr")
    clip_grad_norm: float = option(0.01, "maximum norm of the whole gradient; 0: no clipping")
    grad_accum_steps: int = option(
        1, "micro-batches per step: less memory, but each is run twice forward", min=1
    )

    preset: str = option(
        "", "shapes, coco, cityscapes, or auto, the default for a folder (training/auto.py)", group="run"
    )
    hours: float = option(0.0, "fit --steps to this time, measured before training; 0: --steps as they are")
    out: str = option("", "folder of checkpoints and logs; default: runs/<data>-<ratio>")
    device: str = option("", "cuda, mps or cpu; default: the best available")
    precision: str = option("", "bf16 or fp32; default: bf16 where the device is fast at it")
    compile: bool = option(False, "compile the model with torch.compile: minutes at the start of a phase")
    log_every: int = option(50, "steps between two log lines", min=1)
    save_every: int = option(1000, "steps between two checkpoints to resume from", min=1)
    eval_every: int = option(0, "steps between two evaluations; 0: only at the end of a phase")
    tensorboard: bool = option(False, "write curves and pictures for TensorBoard to <out>/tensorboard")

    given = frozenset()  # the options that were given as flags, which preset auto does not choose
    settings_from = ""  # the run of --settings-from
    scale_to_batch = False  # --scale-to-batch has set lr, steps and EMA decay
    choices = None  # {option: (value, reason)} that preset auto or --hours has chosen

    @property
    def reasons(self) -> dict[str, str]:
        """The reasons of the choices that no flag overrides."""
        return {name: why for name, (_, why) in (self.choices or {}).items() if name not in self.given}

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"--ratio {self.ratio:g} must be in (0, 1]; 5 % is 0.05")
        if len(self.steps) == 1:
            self.steps *= 3
        if len(self.steps) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.steps):
            raise ValueError(f"--steps must be one or three whole numbers, at least 1, found {self.steps}")
        self.pretrained = {"True": "true", "False": "false"}.get(str(self.pretrained), self.pretrained)
        # Before noise and CutMix this option was true or false.
        self.strong_view = {"true": "color", "false": ""}.get(str(self.strong_view).lower(), self.strong_view)
        for change in filter(None, self.strong_view.split(",")):
            if change not in STRONG_VIEW:
                choices = ", ".join(STRONG_VIEW)
                raise ValueError(f"--strong-view must be of {choices}, or false, found {change!r}")
        if len(self.loss_weights) != 3:
            raise ValueError(f"--loss-weights must be three numbers, found {self.loss_weights}")
        if len(self.test_size) not in (0, 2):
            raise ValueError(f"--test-size must be two numbers, found {self.test_size}")
        if self.unannotated not in ("", "background", "unlabeled"):
            raise ValueError(f"--unannotated must be background or unlabeled, found {self.unannotated!r}")
        if self.grad_accum_steps > 1 and self.norm == "batch":
            raise ValueError("--grad-accum-steps must be 1 with --norm batch, which needs whole batches")
        if self.supervised_only and (self.teacher_checkpoint or self.student_checkpoint):
            raise ValueError(
                "--supervised-only trains a fresh model; drop the checkpoints of --teacher-checkpoint "
                "and --student-checkpoint"
            )
        if self.supervised_only and self.finetune_steps:
            raise ValueError(
                "--finetune-steps follows distillation, which --supervised-only leaves out; drop one"
            )
        if self.teacher_checkpoint and self.student_checkpoint:
            raise ValueError("--student-checkpoint starts at phase 3; drop --teacher-checkpoint")
        self.model_args, self.data_args = self.model_args or {}, self.data_args or {}
        self.num_queries = self.num_queries or (200 if self.backbone == "swin_l" else 100)
        # COCO models with crops of 1024 are tested at 800 x 1333; keep that proportion.
        proportional = (
            round(800 / 1024 * min(self.crop, default=0)),
            round(1333 / 1024 * max(self.crop, default=0)),
        )
        given = self.test_size or (None, None)
        self.test_size = tuple(p if side is None else side for p, side in zip(proportional, given))
        if not self.test_size[0]:
            self.test_size = (0, 0)  # without resizing the longer side has no limit
        elsewhere = {"num_classes", "backbone", "pretrained", "norm", "num_queries", "backbone_weights"}
        for name, value in self.model_args.items():
            if name in elsewhere:
                raise ValueError(
                    f"--model-args: cannot set {name} here; it is an option or follows from the data"
                )
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--model-args: {name} must be at least 1, found {value}")
        check_ranges(self)
        self.data = os.path.normpath(self.data)  # my_dataset/ is my_dataset
        name = Path(self.labeled_list).stem or f"{self.ratio:g}"
        self.out = self.out or f"runs/{Path(self.data).resolve().name}-{name}"


def check_ranges(cfg: Config) -> None:
    """Raises ValueError for a number that is infinite or outside the range of its option."""
    for field in dataclasses.fields(cfg):
        value, (least, most) = getattr(cfg, field.name), field.metadata["range"]
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, (int, float)) and not (least <= number <= most and abs(number) < math.inf):
                limits = f"at least {least:g}" + f" and at most {most:g}" * (most < math.inf)
                raise ValueError(f"--{field.name.replace('_', '-')} must be {limits}, found {number}")


PRESETS = {
    # The paper's recipe on COCO. Guided burn-in of 25,000 steps is from a published re-run (the released
    # default is 50,000); the length of teacher burn-in is our choice.
    "coco": {},
    # Your own images: training/auto.py chooses from them and from the machine.
    "auto": {},
    "cityscapes": dict(
        crop=(512, 1024),
        short_sides=tuple(round(512 + 102.4 * i) for i in range(16)),
        color_jitter=True,
        test_size=(1024, 2048),
        norm="batch",
        schedule="poly",
        steps=(15_000, 15_000, 75_000),
    ),
    # Small enough for two CPU cores and trained from scratch, so a short run needs a larger learning
    # rate, a looser clip and a faster EMA than the paper's: in 900 steps a decay of 0.9996 would keep 70
    # % of the initial teacher. The threshold is 0.9 because "no object" weighs only 0.1 in the loss,
    # which inflates scores: a query that is right one time in five converges to 0.2 / (0.2 + 0.1 * 0.8) =
    # 0.71 (experiments/ABLATION.md has thresholds).
    "shapes": dict(
        crop=(96, 96),
        lsj_scale=(0.8, 1.25),
        blur=(0.1, 1.0),
        test_size=(0, 0),
        workers=0,
        backbone="resnet10t",
        pretrained="false",
        norm="group",
        num_queries=12,
        model_args=dict(
            backbone_args={"stem_type": "", "channels": [32, 64, 128, 128]},
            hidden_dim=64,
            encoder_layers=1,
            encoder_ffn=128,
            decoder_layers=3,
            decoder_ffn=128,
        ),
        lr=1e-3,
        backbone_lr_factor=1.0,
        clip_grad_norm=1.0,
        schedule="cosine",
        batch=8,
        num_points=256,
        steps=(500, 700, 900),
        score_threshold=0.9,
        ema_decay=0.998,
        precision="fp32",  # bf16 does not speed up a model this small
        save_every=100,
        eval_every=250,
    ),
}


# What --recipe sets: plain options, which flags override. "paper" is the default of the datasets with a name,
# "robust" that of auto.
RECIPES = {
    "paper": dict(
        mask_nms_iou=1.0,
        full_res_masks=False,
        min_area=5,
        strong_view="color",
        student_from_teacher=False,
        unsupervised_weight=2.0,
    ),
    "robust": dict(
        mask_nms_iou=0.5,
        full_res_masks=True,
        min_area=5,
        strong_view="color,noise,cutmix",
        student_from_teacher=True,
        unsupervised_weight=0.5,
    ),
}


def write_settings(cfg: Config) -> None:
    """Write the options of a run, and what was chosen for it, to out/settings.json, completely or not at
    all."""
    path = Path(cfg.out) / "settings.json"
    temporary = path.with_suffix(".tmp")
    content = {"options": dataclasses.asdict(cfg), "choices": cfg.choices or {}}
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def read_settings(run) -> dict:
    """Read what `write_settings` wrote: {"options": {name: value}, "choices": {name: [value, reason]}}. run:
    the folder of the run, or a checkpoint in it. Raises ValueError."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    try:
        content = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        known = {field.name for field in dataclasses.fields(Config)}  # an earlier version had others too
        options = current_options(content["options"])
        options = {name: value for name, value in options.items() if name in known}
        choices = {name: choice for name, choice in content["choices"].items() if name in known}
        for name in (field.name for field in dataclasses.fields(Config) if field.type is tuple):
            if name in options:
                options[name] = tuple(options[name])
            if name in choices:
                choices[name][0] = tuple(choices[name][0])
        return {**content, "options": options, "choices": choices}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot read the settings of the run {str(run)!r}: {error}") from None


def rescale_for_batch_size(cfg: Config, batch: int) -> dict:
    """Return the lr, steps and EMA decay that train about the same with another batch size. With k times
    the images per step: 1/k of the steps, so as many images in all; lr * sqrt(k), because the noise of
    Adam's steps falls with sqrt(k) (Malladi et al., NeurIPS 2022, arXiv 2205.10287); and decay ** k, so
    that the teacher lags as many images behind the student (Busbridge et al., NeurIPS 2023, arXiv
    2307.13813)."""
    k = batch / cfg.batch
    steps = tuple(max(1, round(number / k)) for number in cfg.steps)
    return {"lr": cfg.lr * k**0.5, "steps": steps, "ema_decay": cfg.ema_decay**k}
