"""Guided Distillation (Berrada et al., WACV 2024, arXiv 2308.02668) end to end: phases 1 and 2
(burnin.py) if their checkpoints are missing, then phase 3, distillation.

In distillation the teacher starts as a copy of the student and follows it by an exponential moving
average (EMA), while the student keeps learning from the labels and from the teacher's pseudo-labels.

    python distill.py --data shapes --ratio 0.1                        # a laptop CPU, some minutes
    torchrun --nproc_per_node=8 distill.py --data coco --ratio 0.01    # 8 GPUs
    python distill.py --data my_dataset --unlabeled my_images/         # your own; --preset auto sets the rest

It writes teacher.pt, burnin.pt, distill.pt, a picture and report.html to runs/<data>-<ratio>/. An
interrupted run is resumed by the same command. --finetune-steps adds a last phase on labels alone, which
is not in the paper."""

if __name__ == "__main__":
    from training.cli import answer_early

    answer_early(__doc__)

from pathlib import Path

import torch
from torch import nn

from burnin import (
    evaluate_if_due,
    finish_phase,
    log_guided_step,
    merge_losses,
    pseudo_labels,
    run_burn_in,
    run_supervised,
    train_supervised,
)
from data import DataError
from matcher import SetCriterion
from tools.report import report_run
from training.checkpoint import (
    Checkpointer,
    completed_phases,
    load_checkpoint,
    load_model,
    load_student_checkpoint,
)
from training.cli import expected_errors, parse_config
from training.config import Config
from training.distributed import (
    Env,
    autocast,
    compile_model,
    num_objects,
    print_rank0,
    rank,
    to_device,
    wrap_ddp,
)
from training.metrics import Metrics
from training.micro_batches import split_outputs
from training.optimization import GuardedStep, build_optimizer, load_moments, seed_step, set_lr
from training.robust import clean_pseudo_labels, mix_views
from training.run_data import Data
from training.setup import describe, model_arguments, print_setup, set_up


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Update the teacher: decay * teacher + (1 - decay) * student, for parameters and floating-point
    buffers (section 3.3 of the paper). Integer buffers are copied."""
    pairs = list(zip(teacher.state_dict().values(), student.state_dict().values(), strict=True))
    floats = [(t, s) for t, s in pairs if t.is_floating_point()]
    # All tensors in a few kernel launches, as torch.optim.swa_utils does.
    torch._foreach_lerp_([t for t, _ in floats], [s for _, s in floats], 1 - decay)
    for t, s in pairs:
        if not t.is_floating_point():
            t.copy_(s)


def distill(cfg: Config, env: Env, data: Data, criterion: SetCriterion) -> None:
    """Phase 3, distillation: like guided burn-in, but the teacher starts as a copy of the student and is
    its EMA. Writes distill.pt."""
    source = load_student_checkpoint(cfg, data.train.class_names, model_arguments(cfg, data))
    student = load_model(source, env.device).requires_grad_(True).train()
    teacher = load_model(source, env.device)  # a copy of the student
    optimizer = build_optimizer(student, cfg)
    load_moments(optimizer, source["optimizer"])  # phases 2 and 3 are one run of the optimizer
    checkpoints = Checkpointer(cfg, "distill", cfg.steps[2], student, optimizer, teacher, describe(cfg, data))
    first_step = checkpoints.resume(env)
    ddp_student = wrap_ddp(student, env, cfg.grad_accum_steps, cfg.compile)
    run_teacher = compile_model(teacher, cfg.compile)
    clip_and_step = GuardedStep(student, optimizer, cfg.clip_grad_norm)
    labeled = data.labeled_batches("distill", first_step)
    unlabeled = data.unlabeled_batches("distill", first_step)
    metrics = Metrics(cfg, "distill", cfg.steps[2], first_step, optimizer, env)

    for step in range(first_step, cfg.steps[2]):
        seed_step(cfg.seed, "distill", step)
        # Phases 2 and 3 share one learning-rate schedule.
        set_lr(optimizer, cfg.schedule, (cfg.steps[1] + step) / (cfg.steps[1] + cfg.steps[2]))
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
        if not clip_and_step(f"distill step {step + 1}", losses, x["file"] + u["file"]):
            continue
        ema_update(teacher, student, cfg.ema_decay)  # the teacher follows the student

        # Logging, saving and evaluation from here on.
        log_guided_step(metrics, step + 1, losses_x, losses_u, pseudo, teacher_outputs, cfg)
        checkpoints.save_if_due(step + 1)
        evaluate_if_due(step + 1, metrics, cfg, data, student, teacher)

    finish_phase(metrics, checkpoints, cfg, data, student, teacher)


def finetune(cfg: Config, env: Env, data: Data, criterion: SetCriterion) -> None:
    """Fine-tune the student on the labels alone, to correct what it learned from wrong pseudo-labels. Not
    in the paper; after CAST (Taghavi et al., 2025, arXiv 2505.21904). Writes finetune.pt."""
    student = load_model(load_checkpoint(Path(cfg.out) / "distill.pt"), env.device).requires_grad_(True)
    train_supervised(cfg, env, data, criterion, "finetune", cfg.finetune_steps, student, lr_factor=0.1)


def main(argv=None) -> None:
    with expected_errors():
        cfg = parse_config(argv, __doc__)
        env, data, criterion = set_up(cfg)
        completed = completed_phases(cfg, env, data.hashes)
        print_setup(cfg, data, last_phase=3)
    with expected_errors(DataError):
        if cfg.supervised_only:
            return run_supervised(cfg, env, data, criterion, completed)
        if not (cfg.student_checkpoint or "distill" in completed):
            run_burn_in(cfg, env, data, criterion, completed)
        if "distill" not in completed:
            print_rank0("phase 3 of 3, distillation: the teacher follows the student")
            distill(cfg, env, data, criterion)
        if cfg.finetune_steps and "finetune" not in completed:
            print_rank0("fine-tuning: labels only, at a tenth of the learning rate")
            finetune(cfg, env, data, criterion)
        elif "distill" in completed:
            print_rank0("all phases are done")
        if data.val and rank() == 0:
            with expected_errors(OSError):
                report_run(cfg, data)


if __name__ == "__main__":
    main()
