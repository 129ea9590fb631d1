"""Phases 1 and 2 of Guided Distillation (Berrada et al., WACV 2024, arXiv 2308.02668, section 3): teacher
burn-in and guided burn-in.

"Burn-in" means here what the paper calls by that name: the time before teacher and student learn from one
another. First a teacher learns from the few labelled images alone. Then a fresh student, not a copy of it,
learns from the same labels and, on unlabelled images, from the pseudo-labels of the teacher, which stays as
it is. In most other papers burn-in is only the first of these.

A pseudo-label is a class and a mask that the teacher predicts with confidence, taken as if a person had drawn
it. Of an unlabelled image the teacher sees the weak view (resized, cropped, mirrored), and the student the
strong view (the same crop with other colours, grey or blurred), so that the teacher's masks fit both. A query
is one of the model's slots (model.py), each of which may claim one object.

    python burnin.py --data shapes --ratio 0.1                       # a laptop; writes runs/shapes-0.1/
    torchrun --nproc_per_node=8 burnin.py --data coco --ratio 0.01   # many GPUs
    python burnin.py --data my_dataset --teacher teacher.pt          # with a teacher of one's own

It writes teacher.pt, then burnin.pt; distill.py goes on from there."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import engine
from data import DataError
from engine import Run, autocast, say
from evaluate import ap_line, load_model, sheet
from flags import check_ranges, knob, user_errors
from health import health, health_lines
from matcher import SetCriterion
from model import Prediction, resize
from setting import Setting, load_teacher, parse


@dataclass
class Config:
    """What a run may vary. The defaults are the paper's on COCO with ResNet-50, but for the lengths of the
    two burn-ins; PRESETS change them per data set, flags change both. The strengths of the strong view stand
    in data.strong_view, how points are sampled in matcher.SetCriterion."""

    student, refine = "", 0  # flags of distill.py alone

    data: str = knob(
        "shapes",
        "shapes, coco, cityscapes, or a folder with instances_train.json, instances_val.json, images/",
        group="data",
    )
    root: str = knob("", "where COCO or Cityscapes lies, or shapes is written; empty: a folder in datasets/")
    train_json: str = knob("", "with a folder as --data: this file in place of its instances_train.json")
    val_json: str = knob("", "this in place of its instances_val.json")
    image_folder: str = knob("", "this in place of its images/")
    unlabelled: list = knob(None, "folders whose images, also in subfolders, join the unlabelled pool")
    split: str = knob("", "file with the labelled images, a line each, in place of --ratio")
    preset: str = knob(
        "", "values of another data set: shapes, coco or cityscapes; empty: those of --data, or coco"
    )
    ratio: float = knob(0.1, "labelled share of the training images, in (0, 1]")
    out: str = knob("", "folder of checkpoints and logs; empty: runs/<data>-<ratio>")
    crop: tuple = knob((1024, 1024), "height and width of training crops, pixels, multiples of 32")
    scale: tuple = knob(
        (0.1, 2.0), "large-scale jitter: the image is resized to fit the crop times a factor of this range"
    )
    short_side: tuple = knob(
        (), "instead of large-scale jitter: resize the shorter side to one of these, pixels"
    )
    colour: bool = knob(False, "photometric jitter of the weak view (the paper's Cityscapes recipe)")
    blur: tuple = knob((0.1, 2.0), "sigma of the strong view's Gaussian blur, pixels")
    test_short_side: int = knob(
        None, "shorter side at test time, pixels; 0: as it is; empty: as the crop, 800 for a side of 1024"
    )
    test_long_side: int = knob(None, "limit of the longer side; empty: as the crop, 1333 for a side of 1024")
    workers: int = knob(4, "loader processes for each of the two streams; 0 loads in the training process")
    loader_timeout: float = knob(300.0, "seconds without an image after which one counts as stuck")

    backbone: str = knob(
        "resnet50",
        "resnet50, resnet101, swin_t, swin_s, swin_b, swin_l, deit_b, dinov2_b, dinov2_l, or a timm model",
        group="model",
    )
    pretrained: bool = knob(True, "start from timm's ImageNet weights (downloads them)")
    backbone_weights: str = knob("", "start from this file of timm's names instead")
    init: str = knob(
        "", "checkpoint that every fresh model starts from: ours, the official Mask2Former's, Hugging Face's"
    )
    backbone_args: dict = knob(None, "further arguments of timm.create_model, as JSON")
    pixel_mean: tuple = knob((), "mean of the backbone's input per RGB channel in 0..255; empty: timm's")
    pixel_std: tuple = knob((), "standard deviation likewise")
    norm: str = knob("frozen", "the backbone's batch norms: frozen, batch (trained, synchronised), group")
    num_queries: int = knob(0, "objects found in an image at most; 0: 100, with swin_l 200")
    hidden_dim: int = knob(256, "channels of pixel decoder and transformer decoder", least=1)
    encoder_layers: int = knob(6, "deformable attention layers of the pixel decoder", least=1)
    encoder_ffn: int = knob(1024, "width of their feed-forward networks", least=1)
    decoder_layers: int = knob(9, "layers of the transformer decoder", least=1)
    decoder_ffn: int = knob(2048, "width of their feed-forward networks", least=1)

    lr: float = knob(1e-4, "AdamW's learning rate", group="optimisation, all phases")
    weight_decay: float = knob(0.05, "AdamW's weight decay; none on norms, embeddings and position tables")
    backbone_lr_factor: float = knob(0.1, "the backbone's learning rate is this times lr")
    clip: float = knob(0.01, "largest norm of the whole model's gradient; 0: no clipping")
    schedule: str = knob(
        "step",
        "learning rate over phase 1, and over phases 2 and 3 together: poly (power 0.9), step (x 0.1 at "
        "0.889 and 0.963 of it), cosine",
    )
    warmup: float = knob(0.0, "share of the schedule over which the learning rate rises from zero", most=1)
    batch: int = knob(16, "labelled images a step, and as many unlabelled ones, over all processes", least=1)
    scale_to_batch: bool = knob(
        False, "take lr, steps and EMA decay from the preset as they follow from --batch"
    )
    accumulate: int = knob(
        1,
        "parts in which a batch goes through the student: less memory, a third more time, the same result",
        least=1,
    )
    num_points: int = knob(12544, "points on which masks are compared, in matching and losses", least=1)
    loss_weights: tuple = knob((2.0, 5.0, 5.0), "weights of class, mask BCE and dice, in matching and losses")
    no_object_weight: float = knob(0.1, 'weight of the class "no object" in the classification loss')
    steps: tuple = knob(
        (25_000, 25_000, 343_750),
        "steps of teacher burn-in (our choice), guided burn-in (a published re-run's; the released default "
        "is 50,000), distillation",
    )
    labels_only: bool = knob(
        False, "the control: the teacher's training alone, for the steps of all three phases"
    )

    score_threshold: float = knob(
        0.7, "lowest class probability of a pseudo-label", most=1, group="guidance, phases 2 and 3"
    )
    min_area: int = knob(5, "a pseudo-label's mask has more pixels than this, at a quarter of the resolution")
    mask_threshold: float = knob(
        0.0, "lowest mean mask probability inside a pseudo-label's mask (PL-DC: 0.9); 0: any", most=1
    )
    max_overlap: float = knob(
        1.0, "of two pseudo-labels whose masks have a larger IoU the better one stays; 1: both do", most=1
    )
    fine_masks: bool = knob(
        False, "pseudo-labels' masks at full resolution, for small objects; false: at a quarter of it"
    )
    pixel_weights: bool = knob(
        False, "weight the mask BCE at each pixel of a pseudo-label by how sure the teacher is of it (PL-DC)"
    )
    score_power: float = knob(
        0.0, "weight a pseudo-label's losses by this power of its score (PAIS); 0: all alike"
    )
    unsupervised_weight: float = knob(2.0, "weight of the loss on unlabelled images")
    strong_view: bool = knob(
        True, "the student sees strong views of unlabelled images; false: the teacher's weak ones, a control"
    )
    repeat_threshold: float = knob(
        10.0, "repeat-factor sampling of labelled images (data.repeat_factors), for rare classes; 0: uniform"
    )
    teacher: str = knob(
        "", "checkpoint of a teacher of one's own, whose student it is if it has two; phase 1 is skipped"
    )

    seed: int = knob(
        0, "of the labelled split, the initial weights, the views and the points", group="the run"
    )
    device: str = knob("", "cuda, mps or cpu; empty: the best there is")
    precision: str = knob(
        "", "of the model's passes: bf16 or fp32; empty: bf16 where the device does it well"
    )
    log_every: int = knob(50, "steps between two log lines", least=1)
    save_every: int = knob(1000, "steps between two checkpoints that a stopped run goes on from", least=1)
    keep: int = knob(2, "how many of these are kept while their phase lasts", least=1)
    eval_every: int = knob(0, "steps between two evaluations; 0: only at the end of a phase")
    tensorboard: bool = knob(False, "curves and pictures for TensorBoard, in the folder tensorboard of --out")

    def __post_init__(self):
        if not 0 < self.ratio <= 1:
            raise ValueError(f"--ratio {self.ratio:g} must be in (0, 1]; 5 % is 0.05")
        if len(self.steps) == 1:
            self.steps *= 3
        if len(self.steps) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.steps):
            raise ValueError(f"--steps is one number or three, whole and at least 1, found {self.steps}")
        if self.accumulate > 1 and self.norm == "batch":
            raise ValueError("--accumulate is 1 with --norm batch, whose statistics are a batch's")
        if self.labels_only and (self.teacher or self.student):
            raise ValueError("--labels-only trains a fresh model, without --teacher and --student")
        if self.teacher and self.student:
            raise ValueError("--student begins with phase 3, where nothing is left to do for --teacher")
        threes = {
            "loss-weights": self.loss_weights,
            "pixel-mean": self.pixel_mean,
            "pixel-std": self.pixel_std,
        }
        for name, numbers in threes.items():
            if len(numbers) != 3 and (numbers or name == "loss-weights"):
                raise ValueError(f"--{name} must be three numbers, found {numbers}")
        if self.test_short_side is None:
            self.test_short_side = round(800 / 1024 * min(self.crop, default=0))
        if self.test_long_side is None:
            self.test_long_side = round(1333 / 1024 * max(self.crop, default=0))
        check_ranges(self)
        self.num_queries = self.num_queries or (200 if self.backbone == "swin_l" else 100)
        share = Path(self.split).stem or f"{self.ratio:g}"
        self.out = self.out or f"runs/{Path(self.data).resolve().name}-{share}"


PRESETS = {
    # Small enough for two CPU cores, and from scratch: a short run needs a larger learning rate, a looser
    # clip and a faster EMA than the paper's. "No object" weighs only 0.1 in the loss, so scores are too
    # high: a query that is right one time in five settles at 0.2 / (0.2 + 0.1 * 0.8) = 0.71. In training
    # pseudo-labels doubled with a threshold of 0.5, with 0.7 they became 30 to 60 % more, with 0.9 less than
    # 20 %; AP was 42.5, 44.7 and 44.6 (bench/ABLATION.md).
    "shapes": dict(
        crop=(96, 96),
        scale=(0.8, 1.25),
        blur=(0.1, 1.0),
        test_short_side=0,
        workers=0,
        backbone="resnet10t",
        pretrained=False,
        backbone_args={"stem_type": "", "channels": [32, 64, 128, 128]},
        norm="group",
        num_queries=12,
        hidden_dim=64,
        encoder_layers=1,
        encoder_ffn=128,
        decoder_layers=3,
        decoder_ffn=128,
        lr=1e-3,
        backbone_lr_factor=1.0,
        clip=1.0,
        schedule="cosine",
        warmup=0.05,
        batch=8,
        num_points=256,
        steps=(500, 700, 900),
        score_threshold=0.9,
        precision="fp32",  # a model as small gains nothing by bf16
        save_every=100,
        eval_every=250,
    ),
    "coco": {},
    "cityscapes": dict(
        crop=(512, 1024),
        short_side=tuple(round(512 + 102.4 * i) for i in range(16)),
        colour=True,
        test_short_side=1024,
        test_long_side=2048,
        norm="batch",
        schedule="poly",
        steps=(15_000, 15_000, 75_000),
    ),
}


# ------------------------------------------------------------------------------------------------ the method


# Settings by which a query's mask becomes a pseudo-label, or does not.
KEPT_BY = "score_threshold", "min_area", "mask_threshold", "max_overlap"


@torch.no_grad()
def pseudo_labels(
    outputs: dict,
    score_threshold: float = 0.7,
    min_area: int = 5,
    mask_threshold: float = 0.0,
    max_overlap: float = 1.0,
    fine_masks: bool = False,
    pixel_weights: bool = False,
    score_power: float = 0.0,
) -> list[dict]:
    """What the teacher is sure of, as targets (Guided Distillation, section 3.2). Hard labels; duplicates are
    not suppressed, unless by max_overlap.

    outputs: as `Mask2Former` returns them, (B, Q, K+1) and (B, Q, h, w). A query is kept when its most
    probable entry is a class with a probability above score_threshold, and its mask has more than min_area
    pixels above 0.5 at stride 4, whose mean probability is at least mask_threshold. With a max_overlap below
    1, it also goes if its mask has a larger IoU than that with the mask of another one of a higher score
    (Fast NMS of YOLACT, Bolya et al., ICCV 2019, arXiv 1904.02689, section 3.3, but over all classes).

    Returns per image "labels" (N,) int64, "masks" (N, h, w) bool, "scores" (N,) in [0, 1], and "highest", the
    largest class probability of any query. With fine_masks, masks are (N, 4 h, 4 w): logits are interpolated
    before the threshold. With pixel_weights also "pixel_weights" (N, h, w), 0 where the mask probability
    is 0.5 and 1 where it is 0 or 1; with a score_power also "weights" (N,), that power of the score."""
    probabilities = outputs["pred_logits"].float().softmax(-1)
    scores, labels = probabilities.max(-1)  # (B, Q)
    highest = probabilities[..., :-1].amax((1, 2))  # (B,)
    masks = outputs["pred_masks"] > 0  # sigmoid above 0.5
    areas = masks.sum((2, 3))  # (B, Q)
    no_object = outputs["pred_logits"].shape[-1] - 1
    keep = (labels != no_object) & (scores > score_threshold) & (areas > min_area)
    if mask_threshold:
        inside = (outputs["pred_masks"].float().sigmoid() * masks).sum((2, 3))
        keep &= inside >= mask_threshold * areas
    if max_overlap < 1:
        flat = (masks & keep[:, :, None, None]).flatten(2).float()
        common = flat @ flat.transpose(1, 2)  # (B, Q, Q)
        union = areas[:, :, None] + areas[:, None] - common
        better = keep[:, None] & (scores[:, None] > scores[:, :, None])
        keep &= ~(better & (common > max_overlap * union)).any(2)
    queries = [kept.nonzero()[:, 0].to(masks.device, non_blocking=True) for kept in keep.cpu()]
    targets = [
        {"labels": labels[b, kept], "masks": masks[b, kept], "scores": scores[b, kept], "highest": highest[b]}
        for b, kept in enumerate(queries)
    ]
    for target, mask_logits, kept in zip(targets, outputs["pred_masks"], queries):
        if fine_masks:
            size = [4 * side for side in mask_logits.shape[1:]]
            target["masks"] = resize(mask_logits[kept].float()[:, None], size)[:, 0] > 0
        if pixel_weights:
            target["pixel_weights"] = 2 * (mask_logits[kept].float().sigmoid() - 0.5).abs()
        if score_power:
            target["weights"] = target["scores"] ** score_power
    return targets


def teacher_labels(teacher: nn.Module, images: Tensor, cfg: Config, device) -> list[dict]:
    """A teacher's pseudo-labels of images (B, 3, H, W) uint8."""
    with torch.inference_mode(), autocast(device):
        outputs = teacher(images)
    names = *KEPT_BY, "fine_masks", "pixel_weights", "score_power"
    return pseudo_labels(outputs, **{name: getattr(cfg, name) for name in names})


def supervised_step(student: nn.Module, criterion: SetCriterion, labelled: list[dict], device) -> dict:
    """Mask2Former's losses on a batch of labelled images."""
    with autocast(device):
        outputs = student(stack_images(labelled, "image", device))
    return set_losses(criterion, outputs, to_device(labelled, device))


def guided_step(
    student, teacher, criterion, labelled, unlabelled, cfg, device
) -> tuple[dict, dict, list[dict]]:
    """The losses of a step in phases 2 and 3: on labelled images against their labels, on unlabelled ones
    against the teacher's pseudo-labels. The teacher sees the weak view, the student the strong view of the
    same crop, if there is one. Returns both dictionaries and the pseudo-labels."""
    pseudo = teacher_labels(teacher, stack_images(unlabelled, "image", device), cfg, device)

    # One pass for both: DistributedDataParallel wants a backward before the next one. Only --norm batch mixes
    # them, in its statistics.
    view = "strong" if "strong" in unlabelled[0] else "image"
    with autocast(device):
        views = [stack_images(labelled, "image", device), stack_images(unlabelled, view, device)]
        outputs = student(torch.cat(views))
    B, targets = len(labelled), to_device(labelled, device)
    pairs = criterion.match(outputs, targets + pseudo)  # for both: one copy to the CPU
    on_labelled, on_unlabelled = split_outputs(outputs, B)
    losses = set_losses(criterion, on_labelled, targets, [row[:B] for row in pairs])
    guided_losses = set_losses(criterion, on_unlabelled, pseudo, [row[B:] for row in pairs])
    return losses, guided_losses, pseudo


def set_losses(criterion, outputs, targets, pairs=None) -> dict:
    """The criterion's losses, normalised by the mean number of objects over processes."""
    device = outputs["pred_logits"].device
    count = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)
    return criterion(outputs, targets, num_objects=engine.mean_over_processes(count), pairs=pairs)


def split_outputs(outputs: dict, first: int) -> tuple[dict, dict]:
    """The outputs of the first images of a batch, and of the others."""
    both, sizes = ([], []), (first, len(outputs["pred_logits"]) - first)
    for p in (outputs, *outputs["aux_outputs"]):
        parts = {name: value.split(sizes) for name, value in p.items() if name != "aux_outputs"}
        for half, predictions in enumerate(both):
            predictions.append(Prediction({name: part[half] for name, part in parts.items()}))
    return tuple(Prediction(last, aux_outputs=earlier) for last, *earlier in both)


def stack_images(batch: list[dict], key: str, device) -> Tensor:
    """(B, 3, H, W) uint8"""
    return torch.stack([item[key] for item in batch]).to(device, non_blocking=True)


def to_device(batch: list[dict], device) -> list[dict]:
    return [{key: item[key].to(device, non_blocking=True) for key in ("labels", "masks")} for item in batch]


# ------------------------------------------------------------------------------------------------ the phases


def burn_in_teacher(cfg: Config, setting: Setting, phase: str = "teacher") -> None:
    """Phase 1: a model learns from the labelled images alone -> teacher.pt. With the steps of all phases, as
    phase "labels_only", it is the control; like phase 1 it sees all labelled images equally often."""
    steps = cfg.steps[0] if phase == "teacher" else sum(cfg.steps)
    # Run, and so a checkpoint, calls the "student" what is trained: here the teacher to be.
    device, student = setting.device, setting.fresh_model("teacher")
    more = dict(describe=setting.describe, later=setting.later(phase))
    learn_from_labels(Run(cfg, phase, student, device, steps, (0, steps), **more), setting)


def learn_from_labels(run: Run, setting: Setting) -> None:
    """The loop of a phase without a teacher -> out/<phase>.pt"""
    labelled = setting.labelled_stream(run.phase, run.first_step)

    for step in run:
        batch = next(labelled)
        losses = supervised_step(run.student, setting.criterion, batch, setting.device)
        loss = sum(losses.values())
        run.update(loss, losses, batch)
        # logging
        run.log(last_layer(losses), loss=loss, images=len(batch))
        report(run, step + 1, setting, run.model)

    finish(run, setting, run.model)


def burn_in_student(cfg: Config, setting: Setting) -> None:
    """Phase 2: a fresh student learns from the labels and from the frozen teacher -> burnin.pt."""
    schedule = 0, cfg.steps[1] + cfg.steps[2]  # phases 2 and 3 share one learning-rate schedule
    device, student = setting.device, setting.fresh_model("student")
    source = load_teacher(cfg, setting)
    teacher = load_model(source, "student", device)
    describe = setting.describe | {"teacher_args": source["model_args"]}  # it may be another model
    more = dict(describe=describe, later=setting.later("burnin"))
    run = Run(cfg, "burnin", student, device, cfg.steps[1], schedule, teacher, **more)
    labelled, unlabelled = setting.both_streams("burnin", run.first_step)

    for step in run:
        batch, plain = next(labelled), next(unlabelled)
        losses, guided_losses, pseudo = guided_step(
            run.student, teacher, setting.criterion, batch, plain, cfg, device
        )
        loss = sum(losses.values()) + cfg.unsupervised_weight * sum(guided_losses.values())
        run.update(loss, losses | guided(guided_losses), batch + plain)
        # logging
        log_guided(run, losses, guided_losses, pseudo)
        report(run, step + 1, setting, teacher)

    finish(run, setting, teacher)


# ----------------------------------------------------------------------------------------------- what is said


def last_layer(losses: dict, prefix: str = "loss") -> dict:
    """The losses of the last decoder layer."""
    return {f"{prefix}_{name}": losses[f"loss_{name}"] for name in ("ce", "mask", "dice")}


def guided(losses: dict) -> dict:
    """Under names that tell them from those on labelled images."""
    return {f"guided_{name}": loss for name, loss in losses.items()}


def log_guided(run, losses, guided_losses, pseudo) -> None:
    scores = torch.cat([p["scores"] for p in pseudo])
    shown = last_layer(losses) | last_layer(guided_losses, "guided")
    shown |= {"pseudo_labels": len(scores) / len(pseudo), "mean_score": (scores.sum(), len(scores))}
    run.log(
        shown,
        loss=sum(losses.values()),
        guided_loss=sum(guided_losses.values()),
        highest_score=torch.stack([p["highest"] for p in pseudo]).max(),
        images=2 * len(pseudo),
    )
    warn_of_guidance(run)


def warn_of_guidance(run) -> None:
    """Once in a phase, by the last line of its log: the teacher finds nothing, or takes most of its queries
    for objects."""
    number = run.means.get("pseudo_labels")
    strange = number == 0 or number and number > run.teacher.decoder.query_features.num_embeddings / 2
    if strange and not run.warned:
        run.warned = True
        score = f"the teacher's highest score in a step is on average {run.means['highest_score']:.2f}"
        threshold = f"--score-threshold is {run.cfg.score_threshold}"
        say(f"warning: {run.phase}: {number:.1f} pseudo-labels an image; {score}, {threshold}")


def report(run, step: int, setting: Setting, teacher) -> None:
    """Every --eval-every steps, but not at the end: AP, and how good the pseudo-labels of a model are."""
    every = run.cfg.eval_every
    if every and step % every == 0 and step < run.steps:
        with run.safe(step):
            results = measure(run, setting, teacher)
        run.record(step, **results)


def measure(run, setting: Setting, teacher) -> dict:
    """The "ap" of the model that is trained, and "pseudo", the `health` of the teacher's pseudo-labels; in
    guided burn-in also "student_pseudo", of those that its student would give, with which phase 3 begins."""
    results = {"ap": setting.evaluate(run.model), "pseudo": health(teacher, setting, teacher_labels)}
    if run.phase == "burnin":
        results["student_pseudo"] = health(run.model, setting, teacher_labels)
    lines = [f"{run.phase}: {ap_line(results['ap'])}"] if results["ap"] else []
    say(*lines, *health_lines(results["pseudo"]), sep="\n")
    if run.board and setting.val:
        run.model.eval()
        page = sheet(setting.pictures({"prediction": run.model}), ["image", "ground truth", "prediction"])
        run.model.train()
        run.board.add_image("predictions", np.asarray(page), run.step + 1, dataformats="HWC")
    return results


def finish(run, setting: Setting, teacher, **more) -> None:
    warn_of_guidance(run)
    run.finish(**measure(run, setting, teacher), **more)
    say(f"{run.phase} done -> {run.out / (run.phase + '.pt')}")


def main(cfg: Config, setting: Setting) -> None:
    """Whatever of phases 1 and 2 has not been run yet."""
    if cfg.labels_only:
        if not setting.finished["labels_only"]:
            burn_in_teacher(cfg, setting, "labels_only")
        return
    if setting.finished["burnin"]:
        return
    if not cfg.teacher and not setting.finished["teacher"]:
        say("phase 1 of 3, teacher burn-in: labels only")
        burn_in_teacher(cfg, setting)
    say("phase 2 of 3, guided burn-in: a fresh student, a frozen teacher")
    burn_in_student(cfg, setting)


if __name__ == "__main__":
    with user_errors():
        cfg = parse(Config, PRESETS, None, __doc__)
        setting = Setting(cfg)
        setting.show(PRESETS)
    with user_errors(DataError):
        main(cfg, setting)
