"""Guided Distillation (Berrada et al., WACV 2024, arXiv 2308.02668), whole: phase 3, distillation, after
whatever of phases 1 and 2 is missing.

In distillation the teacher begins as a copy of the student and follows it by an exponential moving average,
while the student goes on learning from the labels and from the teacher's pseudo-labels: it is the guided
step of burnin.py with a teacher that follows the student.

    python distill.py --data shapes --ratio 0.1                        # a laptop, some minutes
    torchrun --nproc_per_node=8 distill.py --data coco --ratio 0.01    # many GPUs
    python distill.py --data my_dataset --ratio 0.1                    # a folder in COCO form

It writes teacher.pt, burnin.pt, distill.pt, a picture and report.html into runs/<data>-<ratio>/; the same
command goes on where it was stopped. --refine STEPS adds a last phase on labels alone, which is not in the
paper, and refine.pt."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import burnin
import engine
from burnin import guided_step
from checkpoints import load_checkpoint
from data import DataError
from engine import Run, say
from evaluate import ap_line, ap_table, check_classes, load_model, sheet
from flags import knob, user_errors
from setting import Setting, load_teacher, parse


@dataclass
class Config(burnin.Config):
    """What a run may vary; PRESETS change it per data set, flags change both."""

    ema_decay: float = knob(
        0.9996,
        "share of the teacher's weights that is kept at each step",
        most=1,
        group="distillation, phase 3",
    )
    student: str = knob("", "checkpoint of a burnt-in student of one's own; phases 1 and 2 are skipped")
    refine: int = knob(
        0,
        "steps of a last phase on labels only, which is not in the paper: a schedule of its own with a tenth "
        "of --lr; tried with a third of phase 3; 0: none",
        group="refinement, phase 4",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.refine and self.labels_only:
            raise ValueError("--refine is a phase after distillation, which --labels-only leaves out")


# In the 900 steps of shapes a decay of 0.9996 would keep 70 % of the teacher that phase 3 begins with.
PRESETS = burnin.PRESETS | {"shapes": burnin.PRESETS["shapes"] | {"ema_decay": 0.998}}


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, for parameters and buffers; whole numbers are
    copied (section 3.3)."""
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def distill(cfg: Config, setting: Setting) -> None:
    """Phase 3 -> distill.pt"""
    device = setting.device
    start = load_student(cfg, setting)
    student, teacher = (load_model(start, "student", device) for _ in range(2))
    student.requires_grad_(True)
    schedule = cfg.steps[1], cfg.steps[1] + cfg.steps[2]  # goes on where phase 2 ended
    more = dict(optimizer_state=start["optimizer"], describe=setting.describe, later=setting.later("distill"))
    run = Run(cfg, "distill", student, device, cfg.steps[2], schedule, teacher, **more)
    labelled, unlabelled = setting.both_streams("distill", run.first_step)

    for step in run:
        batch, plain = next(labelled), next(unlabelled)
        losses, guided_losses, pseudo = guided_step(
            run.student, teacher, setting.criterion, batch, plain, cfg, device
        )
        loss = sum(losses.values()) + cfg.unsupervised_weight * sum(guided_losses.values())
        run.update(loss, losses | burnin.guided(guided_losses), batch + plain)
        ema_update(teacher, run.model, cfg.ema_decay)
        # logging
        burnin.log_guided(run, losses, guided_losses, pseudo)
        burnin.report(run, step + 1, setting, teacher)

    teacher_ap = setting.evaluate(teacher)
    if teacher_ap:
        say(f"the EMA teacher: {ap_line(teacher_ap)}")
    burnin.finish(run, setting, teacher, teacher_ap=teacher_ap)


def refine(cfg: Config, setting: Setting) -> None:
    """Phase 4, off by default: the student ends on the labels alone, which shall correct what it has learnt
    from wrong pseudo-labels (CAST, Taghavi et al., 2025, arXiv 2505.21904) -> refine.pt"""
    student = load_model(load_checkpoint(Path(cfg.out) / "distill.pt"), "student", setting.device)
    student.requires_grad_(True)
    more = dict(describe=setting.describe, lr_scale=0.1)
    run = Run(cfg, "refine", student, setting.device, cfg.refine, (0, cfg.refine), **more)
    burnin.learn_from_labels(run, setting)


def load_student(cfg: Config, setting: Setting) -> dict:
    """The checkpoint of phase 2 with which phase 3 begins: this run's, or one's own of the same model."""
    start = load_checkpoint(cfg.student or Path(cfg.out) / "burnin.pt")
    check_classes(start, setting.train.class_names)
    for name, value in setting.model_args.items():
        if start["model_args"][name] != value:
            before = start["model_args"][name]
            raise ValueError(f"--student {cfg.student} is a model with {name} {before!r}, not {value!r}")
    return start


def summary(cfg: Config, setting: Setting) -> None:
    """The table of all phases, a picture of teacher and student on the same images, and the report; of one
    process."""
    out, device = Path(cfg.out), setting.device
    with user_errors():  # an earlier phase's file may be gone
        phases = {} if cfg.student else {"teacher": load_teacher(cfg, setting)}
        if (out / "labels_only.pt").exists():
            phases["labels only"] = load_checkpoint(out / "labels_only.pt")
        phases["burnt-in"] = load_student(cfg, setting)
        last = load_checkpoint(out / "distill.pt")
        refined = load_checkpoint(out / "refine.pt") if (out / "refine.pt").exists() else None
    aps = {name: phase.get("ap") for name, phase in phases.items()}
    aps |= {"student": last["ap"], "EMA teacher": last["teacher_ap"]}
    aps |= {"refined": refined["ap"]} if refined else {}
    ones_own = {"teacher": cfg.teacher, "burnt-in": cfg.student}  # their AP may be of other images
    aps = {name: ap for name, ap in aps.items() if ap and not ones_own.get(name)}
    if aps:
        number, by_class = len(setting.labelled), setting.num_classes <= 10
        say(f"\nmask AP on {len(setting.val)} images, after training with {number} labelled ones\n")
        say(ap_table(aps, by_class))
    first = "burnt-in" if cfg.student else "teacher"
    models = {first: phases[first], **({"refined": refined} if refined else {"student": last})}
    models = {name: load_model(checkpoint, "student", device) for name, checkpoint in models.items()}
    rows, names = setting.pictures(models), ["image", "ground truth", *models]
    sheet(rows, names).save(out / "predictions.png")
    say(f"\npicture: {out / 'predictions.png'}")
    write_report(out, setting, aps, rows, names)


def write_report(out: Path, setting: Setting, aps: dict, rows: list, names: list[str]) -> None:
    """out/report.html, if it can be made."""
    try:
        from tools.report import write_report as write_page
    except ImportError as error:
        return engine.warn(f"no report.html: {error}")
    title = f"Guided Distillation: {setting.cfg.data}, {len(setting.labelled)} labelled images"
    config = dataclasses.asdict(setting.cfg)
    write_page(out / "report.html", title, out / "metrics.jsonl", aps, rows, names, config)
    say(f"curves and all of it: {out / 'report.html'}")


def main(cfg: Config) -> None:
    with user_errors():
        setting = Setting(cfg, last="distill")
        if cfg.student:
            load_student(cfg, setting)  # a wrong file is refused before anything is trained
        setting.show(PRESETS)
    with user_errors(DataError):
        if cfg.labels_only or not (cfg.student or setting.finished["distill"]):
            burnin.main(cfg, setting)
        if cfg.labels_only:
            return
        if not setting.finished["distill"]:
            say("phase 3 of 3, distillation: the teacher follows the student")
            distill(cfg, setting)
        if cfg.refine and not setting.finished["refine"]:
            say("phase 4, refinement: labels only, with a tenth of the learning rate")
            refine(cfg, setting)
        elif setting.finished["distill"]:
            say("all phases are done")
        if setting.val and engine.rank() == 0:
            with user_errors(OSError):
                summary(cfg, setting)


def cli(argv=None) -> None:
    with user_errors():
        cfg = parse(Config, PRESETS, argv, __doc__)
    main(cfg)


if __name__ == "__main__":
    cli()
