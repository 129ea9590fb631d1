"""Phases 1 and 2 of Guided Distillation (Berrada et al., WACV 2024, arXiv 2308.02668, section 3): teacher
burn-in and guided burn-in.

Phase 1, teacher burn-in: a teacher learns from the few labeled images alone. Phase 2, guided burn-in: a fresh
student, not a copy of the teacher, learns from the same labels and, on unlabeled images, from the
pseudo-labels of the teacher, which is frozen. (In most other papers "burn-in" means a supervised phase
only.)

    python burnin.py --data shapes --ratio 0.1                       # a laptop CPU, some minutes
    torchrun --nproc_per_node=8 burnin.py --data coco --ratio 0.01   # 8 GPUs
    python burnin.py --data shapes --teacher-checkpoint teacher.pt   # phase 2 with a given teacher

It writes teacher.pt and burnin.pt to runs/<data>-<ratio>/. distill.py runs phase 3, after these if they
are missing.

Letters in shapes: B images, Q queries, K classes, N pseudo-labels of one image, H W pixels, h w = H/4 W/4."""

if __name__ == "__main__":
    from training.cli import answer_early

    answer_early(__doc__)

import functools

import numpy as np
import torch
from torch import Tensor, nn

from data import DataError
from evaluate import ap_line, compare_predictions, evaluate
from matcher import SetCriterion
from training.checkpoint import Checkpointer, completed_phases, load_model, load_teacher_checkpoint
from training.cli import expected_errors, parse_config
from training.config import Config
from training.distributed import (
    Env,
    autocast,
    compile_model,
    num_objects,
    print_rank0,
    to_device,
    world_size,
    wrap_ddp,
)
from training.metrics import Metrics
from training.micro_batches import split_outputs
from training.optimization import GuardedStep, build_optimizer, seed_step, set_lr
from training.pseudo_label_quality import format_quality, measure_pseudo_labels
from training.robust import clean_pseudo_labels, mix_views
from training.run_data import Data
from training.setup import build_model, describe, print_setup, set_up
from training.visualize import make_grid

# ---------------------------------------------------------------------------------------------- the method


@torch.no_grad()
def pseudo_labels(outputs: dict, score_threshold: float = 0.7, min_area: int = 5) -> list[dict]:
    """Turn a teacher's confident predictions into targets (section 3.2 of the paper).

    A query is kept if its most probable class is not "no object", the probability is above
    score_threshold, and its mask has more than min_area pixels at stride 4. Labels are hard, duplicates
    are kept.

    Args:
        outputs: of Mask2Former: "pred_logits" (B, Q, K+1) and "pred_masks" (B, Q, h, w) logits.

    Returns per image "labels" (N,) int64 and "masks" (N, h, w) bool, the targets of SetCriterion; also
    "scores" (N,), the class probability alone, in (score_threshold, 1], and "mask_logits" (N, h, w)."""
    scores, labels = outputs["pred_logits"].float().softmax(-1).max(-1)  # (B, Q)
    mask_logits = outputs["pred_masks"]
    masks = mask_logits > 0  # (B, Q, h, w), a probability above 0.5
    no_object = outputs["pred_logits"].shape[-1] - 1
    keep = (labels != no_object) & (scores > score_threshold) & (masks.sum((2, 3)) > min_area)
    # One copy to the CPU for the whole batch: nonzero() on a GPU would wait once per image.
    queries = [kept.nonzero()[:, 0].to(masks.device, non_blocking=True) for kept in keep.cpu()]
    values = {"labels": labels, "masks": masks, "scores": scores, "mask_logits": mask_logits}
    return [{name: value[b, q] for name, value in values.items()} for b, q in enumerate(queries)]


# ---------------------------------------------------------------------------------------------- the phases


def train_supervised(
    cfg: Config, env: Env, data: Data, criterion: SetCriterion, phase: str, steps: int, model: nn.Module,
    lr_factor: float = 1.0,
) -> None:  # fmt: skip
    """Train a model on labels alone: phase 1 (teacher burn-in), the supervised baseline, and fine-tuning.
    Writes <phase>.pt."""
    model.train()
    optimizer = build_optimizer(model, cfg, lr_factor)
    checkpoints = Checkpointer(cfg, phase, steps, model, optimizer, description=describe(cfg, data))
    first_step = checkpoints.resume(env)
    ddp_model = wrap_ddp(model, env, cfg.grad_accum_steps, cfg.compile)
    clip_and_step = GuardedStep(model, optimizer, cfg.clip_grad_norm)
    # As in the paper: repeat factors in phases 2 and 3 only.
    labeled = data.labeled_batches(phase, first_step, uniform=True)
    metrics = Metrics(cfg, phase, steps, first_step, optimizer, env)

    for step in range(first_step, steps):
        seed_step(cfg.seed, phase, step)
        set_lr(optimizer, cfg.schedule, step / steps)
        x = to_device(next(labeled), env)

        with autocast(env):
            outputs = ddp_model(x["image"])
        losses = criterion(outputs, x["targets"], num_objects(x["targets"], env))
        loss = sum(losses.values())

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Clip the gradient and step AdamW. All ranks skip it if any gradient is not finite.
        if not clip_and_step(f"{phase} step {step + 1}", losses, x["file"]):
            continue

        # Logging, saving and evaluation from here on.
        metrics.log(step + 1, len(x["image"]), last_layer(losses), loss=loss)
        checkpoints.save_if_due(step + 1)
        evaluate_if_due(step + 1, metrics, cfg, data, model, teacher=model)

    finish_phase(metrics, checkpoints, cfg, data, model, teacher=model)


def guided_burn_in(cfg: Config, env: Env, data: Data, criterion: SetCriterion) -> None:
    """Phase 2, guided burn-in: a fresh student learns from the labels and from the pseudo-labels of the
    frozen teacher. Writes burnin.pt."""
    source = load_teacher_checkpoint(cfg, data.train.class_names)
    teacher = load_model(source, env.device)  # frozen
    if cfg.student_from_teacher:  # beyond the paper
        student = load_model(source, env.device).requires_grad_(True).train()
    else:
        student = build_model(cfg, data, "student").train()  # fresh, not a copy of the teacher
    optimizer = build_optimizer(student, cfg)
    # The teacher may have another architecture than the student.
    description = describe(cfg, data) | {"teacher_args": source["model_args"]}
    checkpoints = Checkpointer(cfg, "burnin", cfg.steps[1], student, optimizer, teacher, description)
    first_step = checkpoints.resume(env)
    ddp_student = wrap_ddp(student, env, cfg.grad_accum_steps, cfg.compile)
    run_teacher = compile_model(teacher, cfg.compile)
    clip_and_step = GuardedStep(student, optimizer, cfg.clip_grad_norm)
    labeled = data.labeled_batches("burnin", first_step)
    unlabeled = data.unlabeled_batches("burnin", first_step)
    metrics = Metrics(cfg, "burnin", cfg.steps[1], first_step, optimizer, env)

    for step in range(first_step, cfg.steps[1]):
        seed_step(cfg.seed, "burnin", step)
        # Phases 2 and 3 share one learning-rate schedule.
        set_lr(optimizer, cfg.schedule, step / (cfg.steps[1] + cfg.steps[2]))
        x, u = to_device(next(labeled), env), to_device(next(unlabeled), env)  # labeled, unlabeled batch

        # The teacher sees the weak view, and what it is confident of becomes pseudo-labels.
        with torch.inference_mode(), autocast(env):
            teacher_outputs = run_teacher(u["image"])
        pseudo = pseudo_labels(teacher_outputs, cfg.score_threshold, cfg.min_area)
        pseudo = clean_pseudo_labels(pseudo, cfg)  # beyond the paper

        strong, targets = mix_views(u["strong"], pseudo, cfg)  # unchanged by default

        # The student sees the strong view of the same crop. DDP wants one forward pass per backward pass.
        with autocast(env):
            outputs = ddp_student(torch.cat([x["image"], strong]))
        outputs_x, outputs_u = split_outputs(outputs, len(x["image"]))
        losses_x = criterion(outputs_x, x["targets"], num_objects(x["targets"], env))
        losses_u = criterion(outputs_u, targets, num_objects(targets, env))
        loss = sum(losses_x.values()) + cfg.unsupervised_weight * sum(losses_u.values())

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        # Clip the gradient and step AdamW. All ranks skip it if any gradient is not finite.
        losses = merge_losses(losses_x, losses_u)
        if not clip_and_step(f"burnin step {step + 1}", losses, x["file"] + u["file"]):
            continue

        # Logging, saving and evaluation from here on.
        log_guided_step(metrics, step + 1, losses_x, losses_u, pseudo, teacher_outputs, cfg)
        checkpoints.save_if_due(step + 1)
        evaluate_if_due(step + 1, metrics, cfg, data, student, teacher)

    finish_phase(metrics, checkpoints, cfg, data, student, teacher)


# ------------------------------------------------------------------------------------ logging and evaluation


def last_layer(losses: dict, prefix: str = "") -> dict:
    """Return the losses of the last decoder layer, for the log."""
    return {f"{prefix}loss_{part}": losses[f"loss_{part}"] for part in ("ce", "mask", "dice")}


def merge_losses(losses_x: dict, losses_u: dict) -> dict:
    """Merge both dictionaries of losses, those on unlabeled images under names of their own."""
    return losses_x | {f"unlabeled_{name}": loss for name, loss in losses_u.items()}


def log_guided_step(
    metrics: Metrics, step: int, losses_x, losses_u, pseudo, teacher_outputs, cfg: Config
) -> None:
    """Log the losses ("loss" on labeled images, "unlabeled_loss" before --unsupervised-weight) and the
    pseudo-labels of a step of phases 2 and 3. Warn once per phase if the teacher
    finds nothing or marks more than half of the queries as objects."""
    scores = torch.cat([target["scores"] for target in pseudo])
    class_probabilities = teacher_outputs["pred_logits"].float().softmax(-1)[..., :-1]  # (B, Q, K)
    printed = last_layer(losses_x) | last_layer(losses_u, "unlabeled_")
    printed |= {"pseudo_labels": len(scores) / len(pseudo)}
    metrics.log(
        step,
        2 * len(pseudo),
        printed,
        loss=sum(losses_x.values()),
        unlabeled_loss=sum(losses_u.values()),
        mean_score=(scores.sum(), len(scores)),
        highest_score=class_probabilities.max(),
    )
    per_image, num_queries = metrics.last.get("pseudo_labels"), class_probabilities.shape[1]
    if per_image is not None and (per_image == 0 or per_image > num_queries / 2):
        highest = f"the teacher's highest score per step averages {metrics.last['highest_score']:.2f}"
        advice = "lower it, or train the teacher longer" if per_image == 0 else "raise it"
        threshold = f"--score-threshold is {cfg.score_threshold}; {advice}"
        metrics.warn_once(f"{per_image:.1f} pseudo-labels per image; {highest}, {threshold}")


def evaluate_if_due(step: int, metrics: Metrics, cfg: Config, data: Data, model, teacher) -> None:
    """Evaluate every --eval-every steps; at the end of the phase finish_phase does."""
    if cfg.eval_every and step % cfg.eval_every == 0 and step < metrics.steps:
        with metrics.paused():
            results = evaluate_phase(step, metrics, cfg, data, model, teacher)
        metrics.write(step, **results)


def evaluate_phase(step: int, metrics: Metrics, cfg: Config, data: Data, model, teacher) -> dict:
    """Measure and print the AP of the trained model and the quality of the teacher's pseudo-labels. In
    guided burn-in measure the student's too, because the student becomes the teacher of phase 3."""
    training = model.training
    model.eval()
    results = {"ap": evaluate_model(model, cfg, data)}
    networks = {"pseudo": teacher}
    if metrics.phase == "burnin":
        networks["student_pseudo"] = model
    for name, network in networks.items():
        predict = functools.partial(predict_pseudo_labels, network, cfg=cfg, env=data.env)
        results[name] = measure_pseudo_labels(predict, data)
    if metrics.board and data.val:
        rows = compare_predictions({"prediction": model}, data.val, **data.test_settings)
        page = np.asarray(make_grid(rows, ["image", "ground truth", "prediction"]))
        metrics.board.add_image("predictions", page, step, dataformats="HWC")
    model.train(training)
    lines = [f"{metrics.phase}: {ap_line(results['ap'])}"] if results["ap"] else []
    print_rank0(*lines, *format_quality(results["pseudo"]), sep="\n")
    return results


def evaluate_model(model, cfg: Config, data: Data) -> dict:
    """Return the AP on the validation set; {} if there is none."""
    if not data.val:
        return {}
    return evaluate(model, data.val, batch_size=cfg.batch // world_size(), **data.test_settings)


def predict_pseudo_labels(teacher: nn.Module, images: Tensor, cfg: Config, env: Env) -> list[dict]:
    """Predict the pseudo-labels of images (B, 3, H, W) with all options of the run."""
    with torch.inference_mode(), autocast(env):
        outputs = teacher(images)
    return clean_pseudo_labels(pseudo_labels(outputs, cfg.score_threshold, cfg.min_area), cfg)


def finish_phase(
    metrics: Metrics, checkpoints: Checkpointer, cfg: Config, data: Data, model, teacher
) -> None:
    """Evaluate at the end of a phase, and write its results to metrics.jsonl and to its final checkpoint."""
    checkpoints.save_step(metrics.steps)  # is there already, unless the last step was skipped
    metrics.end_training()
    results = {}
    if metrics.phase == "distill":
        results["teacher_ap"] = evaluate_model(teacher, cfg, data)
        if results["teacher_ap"]:
            print_rank0(f"the EMA teacher: {ap_line(results['teacher_ap'])}")
    results |= evaluate_phase(metrics.steps, metrics, cfg, data, model, teacher)
    metrics.write(metrics.steps, **results)
    checkpoints.finish(**results)
    metrics.close()


# -------------------------------------------------------------------------------------------------- program


def run_supervised(cfg: Config, env: Env, data: Data, criterion: SetCriterion, completed: set[str]) -> None:
    """Run the supervised baseline, if it is not completed: labels only, for the steps of all phases."""
    if "supervised" in completed:
        print_rank0("the supervised baseline is done")
    else:
        model = build_model(cfg, data, "teacher")
        train_supervised(cfg, env, data, criterion, "supervised", sum(cfg.steps), model)


def run_burn_in(cfg: Config, env: Env, data: Data, criterion: SetCriterion, completed: set[str]) -> None:
    """Run phases 1 and 2, if they are not completed."""
    if "burnin" in completed:
        print_rank0("phases 1 and 2 are done")
    else:
        if not cfg.teacher_checkpoint and "teacher" not in completed:
            print_rank0("phase 1 of 3, teacher burn-in: labels only")
            model = build_model(cfg, data, "teacher")
            train_supervised(cfg, env, data, criterion, "teacher", cfg.steps[0], model)
        start = "a copy of the teacher as student" if cfg.student_from_teacher else "a fresh student"
        print_rank0(f"phase 2 of 3, guided burn-in: {start}, a frozen teacher")
        guided_burn_in(cfg, env, data, criterion)


def main(argv=None) -> None:
    with expected_errors():
        cfg = parse_config(argv, __doc__)
        if cfg.student_checkpoint or cfg.finetune_steps and not cfg.settings_from:
            raise ValueError("--student-checkpoint and --finetune-steps belong to phase 3; run distill.py")
        env, data, criterion = set_up(cfg)
        completed = completed_phases(cfg, env, data.hashes)
        print_setup(cfg, data, last_phase=2)
    with expected_errors(DataError):
        run = run_supervised if cfg.supervised_only else run_burn_in
        run(cfg, env, data, criterion, completed)


if __name__ == "__main__":
    main()
