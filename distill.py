"""Guided Distillation (Berrada et al., WACV 2024, arXiv 2308.02668), whole: phase 3, distillation, after
whatever of phases 1 and 2 is missing.

In distillation the teacher begins as a copy of the student and follows it by an exponential moving average,
while the student goes on learning from the labels and from the teacher's pseudo-labels: it is the guided
step of burnin.py with a teacher that follows the student.

    python distill.py --data shapes --ratio 0.1                        # a laptop, about ten minutes
    torchrun --nproc_per_node=8 distill.py --data coco --ratio 0.01    # many GPUs
    python distill.py --data my_dataset --ratio 0.1                    # a folder in COCO form

It writes teacher.pt, burnin.pt, distill.pt and a picture into runs/<data>-<ratio>/; the same command goes
on where it was stopped."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import burnin
import engine
from burnin import Setting, guided_step
from data import DataError
from engine import Run, knob, say
from evaluate import ap_line, ap_table, compare, load_model
from weights import read_weights


@dataclass
class Config(burnin.Config):
    """Every number of the method; PRESETS change them per data set, flags change both."""

    ema_decay: float = knob(0.9996, "of the teacher's weights that stay at each step", most=1)


PRESETS = {
    "shapes": {**burnin.PRESETS["shapes"], "ema_decay": 0.998},
    "coco": burnin.PRESETS["coco"],
    "cityscapes": burnin.PRESETS["cityscapes"],
}


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
    start = engine.load_checkpoint(Path(cfg.out) / "burnin.pt")
    student, teacher = (load_model(start, "student", device) for _ in range(2))
    student.requires_grad_(True)
    schedule = cfg.steps[1], cfg.steps[1] + cfg.steps[2]  # goes on where phase 2 ended
    run = Run(
        cfg, "distill", student, device, cfg.steps[2], schedule, teacher, start["optimizer"], setting.describe
    )
    labelled, unlabelled = setting.streams("distill", run.first_step, guided=True)

    for step in run:
        batch, pool = next(labelled), next(unlabelled)
        losses, guided_losses, pseudo = guided_step(
            run.student, teacher, setting.criterion, batch, pool, cfg, device
        )
        loss = sum(losses.values()) + cfg.unsupervised_weight * sum(guided_losses.values())
        run.update(loss, losses | burnin.guided(guided_losses), batch + pool)
        ema_update(teacher, run.model, cfg.ema_decay)
        # logging
        burnin.log_guided(run, losses, guided_losses, pseudo)
        if cfg.eval_every and (step + 1) % cfg.eval_every == 0 and step + 1 < run.steps:
            burnin.report(run, step + 1, setting)

    ap, teacher_ap = setting.evaluate(run.model), setting.evaluate(teacher)
    say(f"the EMA teacher  {ap_line(teacher_ap)}")
    burnin.finish(run, ap, teacher_ap=teacher_ap)


def summary(cfg: Config, setting: Setting) -> None:
    """The table of all phases, and a picture of teacher and student on the same images."""
    out, device = Path(cfg.out), setting.device
    source = Path(cfg.teacher or out / "teacher.pt")
    phases = {"teacher": source, "labels only": out / "labels_only.pt", "burnt-in": out / "burnin.pt"}
    phases = {name: read_weights(path) for name, path in phases.items() if path.exists()}
    last = engine.load_checkpoint(out / "distill.pt")
    columns = {name: phase["ap"] for name, phase in phases.items() if "ap" in phase}
    columns |= {"student": last["ap"], "EMA teacher": last["teacher_ap"]}
    say(
        f"\nmask AP on {len(setting.val)} images, after training with {len(setting.labelled)} labelled ones\n"
    )
    say(ap_table(columns, by_class=len(setting.val.class_names) <= 10))
    if engine.rank() == 0:
        chosen = {name: phases[name] for name in ("teacher",) if name in phases} | {"student": last}
        models = {name: load_model(checkpoint, "student", device) for name, checkpoint in chosen.items()}
        sizes = dict(short_side=cfg.test_short_side, long_side=cfg.test_long_side)
        compare(models, setting.val, out / "predictions.png", device, **sizes)
        say(f"\npicture: {out / 'predictions.png'}")


def main(cfg: Config) -> None:
    with engine.user_errors():
        setting = Setting(cfg)
    with engine.user_errors(DataError):
        burnin.main(cfg, setting)
        if cfg.labels_only:
            return
        if not setting.finished["distill"]:
            say("phase 3 of 3, distillation: the teacher follows the student")
            distill(cfg, setting)
        else:
            say("all phases are done")
        if setting.val:
            summary(cfg, setting)


def cli(argv=None) -> None:
    with engine.user_errors():
        cfg = engine.parse_config(Config, PRESETS, argv, __doc__)
    main(cfg)


if __name__ == "__main__":
    cli()
