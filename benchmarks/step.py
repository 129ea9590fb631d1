"""Training steps (forward, losses, backward) of our Mask2Former and of Hugging Face's, with the same weights,
images and targets. The sides take turns, each in a process of its own, as a user would start it.

    python benchmarks/step.py                          # R50, 2 images of 512 x 512, 7 objects each
    python benchmarks/step.py --size 256 --rounds 9
    python benchmarks/step.py --allocator              # every side keeps freed memory
    python benchmarks/step.py --only ours hugging_face ours_copied ours_compiled
    python benchmarks/step.py --device cuda --size 1024 \\
        --only ours hugging_face ours_bf16 hugging_face_bf16 guided_bf16

It prints the median seconds of a step and of its parts, the peak memory, and both relative to Hugging Face's
fp32 step. "guided" is the whole training step of distill.py: as many unlabeled as labeled images, a teacher,
the optimizer and the EMA update. "ours_copied" has model.py and matcher.py alone, as in a project of other
people: without deform_attn_cpu.py and our setting of the allocator."""

import copy
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (
    NUM_CLASSES,
    Clock,
    load_hugging_face,
    load_ours,
    make_batch,
    make_parser,
    normalize,
    parse_flags,
    print_headline,
    print_table,
    ratios,
    take_turns,
)

import model
from burnin import merge_losses, pseudo_labels
from distill import ema_update
from matcher import SetCriterion
from training.config import Config
from training.distributed import (
    Env,
    autocast,
    compile_model,
    init_distributed,
    num_objects,
    to_device,
    wrap_ddp,
)
from training.micro_batches import split_outputs
from training.optimization import GuardedStep, build_optimizer

PARTS = ["backbone", "pixel_decoder", "decoder", "losses", "backward"]


def plain_env(flags, precision: str) -> Env:
    """Return an Env without `init_distributed`, which makes a process on a CPU keep freed memory."""
    if flags.device == "cpu":
        return Env(torch.device("cpu"), precision == "bf16")
    return init_distributed(flags.device, precision)


def ours(flags, precision="fp32", compiled=False, env=None):
    """Train our model on labeled images, without an optimizer."""
    env = env or init_distributed(flags.device, precision)
    images, targets = to_device(list(make_batch(flags.size, flags.batch, flags.objects)), env)
    student = load_ours(flags.folder).train().to(env.device)
    criterion = SetCriterion(NUM_CLASSES).to(env.device)
    parts = dict(backbone=student.backbone, pixel_decoder=student.pixel_decoder, decoder=student.decoder)
    clock = Clock(env.device, losses=criterion, **({} if compiled else parts))
    if compiled:
        # What the model remembers for a size of images must not lie in the memory of a CUDA graph.
        with torch.no_grad():
            student(images)
    called = compile_model(student, compiled)

    def step():
        student.zero_grad(set_to_none=True)
        with autocast(env):
            outputs = called(images)
        loss = sum(criterion(outputs, targets).values())
        with clock("backward"):
            loss.backward()

    return step, clock


def ours_bf16(flags):
    return ours(flags, "bf16")


def ours_copied(flags):
    """Train our model as if only model.py and matcher.py were there."""
    model.ms_deform_attn_cpu, model.linear = None, F.linear
    model.prefers_channels_last = lambda x: False
    return ours(flags, env=plain_env(flags, "fp32"))


def ours_compiled(flags):
    step, clock = ours(flags, "fp32" if flags.device == "cpu" else "bf16", compiled=True)
    step()  # Compiling takes minutes.
    return step, clock


def hugging_face(flags, precision="fp32"):
    """Train Hugging Face's model on labeled images, without an optimizer."""
    env = plain_env(flags, precision)
    images, targets = to_device(list(make_batch(flags.size, flags.batch, flags.objects)), env)
    peer = load_hugging_face(flags.folder).train().to(env.device)
    parts = peer.model
    for name, parameter in parts.pixel_level_module.encoder.named_parameters():
        parameter.requires_grad_("bn" not in name and "downsample.1" not in name)  # frozen, as officially
    for module in parts.pixel_level_module.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    clock = Clock(
        env.device,
        backbone=parts.pixel_level_module.encoder,
        pixel_decoder=parts.pixel_level_module.decoder,
        decoder=parts.transformer_module,
        losses=peer.criterion,
    )
    labels, masks = [t["labels"] for t in targets], [t["masks"].float() for t in targets]

    def step():
        peer.zero_grad(set_to_none=True)
        with autocast(env):
            loss = peer(pixel_values=normalize(images), mask_labels=masks, class_labels=labels).loss
        with clock("backward"):
            loss.backward()

    return step, clock


def hugging_face_bf16(flags):
    """Train Hugging Face's model with autocast around forward pass and losses, as a user would try it."""
    return hugging_face(flags, "bf16")


def guided(flags, precision="fp32", grad_accum_steps=1, compiled=False):
    """Run the training step of distill.py, without loading and logging."""
    env = init_distributed(flags.device, precision)
    images, targets = make_batch(flags.size, flags.batch, flags.objects)
    unlabeled_images, _ = make_batch(flags.size, flags.unlabeled or flags.batch, 0, seed=1)
    labeled = {"image": images, "targets": targets}
    unlabeled = {"image": unlabeled_images, "strong": unlabeled_images}
    student = load_ours(flags.folder).train().to(env.device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    criterion = SetCriterion(NUM_CLASSES).to(env.device)
    # An untrained teacher has low scores: this threshold keeps as many pseudo-labels as there are objects.
    with torch.no_grad(), autocast(env):
        logits = teacher(unlabeled_images.to(env.device))["pred_logits"]
    scores, labels = logits.float().softmax(-1).max(-1)
    ranked = scores[labels < NUM_CLASSES].sort(descending=True).values
    threshold = float(ranked[: flags.objects * len(unlabeled_images) + 1][-1])
    cfg = Config(score_threshold=threshold, lr=0.0)  # training would change the number of pseudo-labels
    optimizer = build_optimizer(student, cfg)
    clip_and_step = GuardedStep(student, optimizer, cfg.clip_grad_norm)
    ddp_student = wrap_ddp(student, env, grad_accum_steps, compiled)
    run_teacher = compile_model(teacher, compiled)

    def step():
        x, u = to_device(labeled, env), to_device(unlabeled, env)
        with torch.inference_mode(), autocast(env):
            teacher_outputs = run_teacher(u["image"])
        pseudo = pseudo_labels(teacher_outputs, cfg.score_threshold, cfg.min_area)
        with autocast(env):
            outputs = ddp_student(torch.cat([x["image"], u["strong"]]))
        outputs_x, outputs_u = split_outputs(outputs, len(x["image"]))
        losses_x = criterion(outputs_x, x["targets"], num_objects(x["targets"], env))
        losses_u = criterion(outputs_u, pseudo, num_objects(pseudo, env))
        loss = sum(losses_x.values()) + cfg.unsupervised_weight * sum(losses_u.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if not clip_and_step("guided step", merge_losses(losses_x, losses_u), []):
            raise FloatingPointError("the gradient is not finite, so the step was skipped")
        ema_update(teacher, student, cfg.ema_decay)
        return {"pseudo-labels": sum(len(target["labels"]) for target in pseudo)}

    return step, Clock(env.device)


def guided_bf16(flags):
    return guided(flags, "bf16")


def guided_in_parts(flags):
    """Run the guided step in micro-batches of one image, as with --grad-accum-steps."""
    return guided(flags, "fp32", grad_accum_steps=2 * flags.batch)


def guided_compiled(flags):
    """Run the guided step as with --compile."""
    step, clock = guided(flags, "fp32" if flags.device == "cpu" else "bf16", compiled=True)
    step()
    return step, clock


def main():
    supervised, guided_sides = (ours, hugging_face, ours_bf16), (guided, guided_bf16, guided_in_parts)
    on_request = ours_copied, ours_compiled, hugging_face_bf16
    sides = {side.__name__: side for side in (*supervised, *guided_sides, *on_request, guided_compiled)}
    default = [side.__name__ for side in (*supervised, *guided_sides)]
    numbers = dict(size=512, batch=2, objects=7, rounds=5, threads=2)
    parser = make_parser(__doc__, **numbers)
    help = "unlabeled images of the guided step; 0: as many as labeled ones"
    parser.add_argument("--unlabeled", "--unlabelled", type=int, default=0, help=help)
    flags = parse_flags(parser, sides, default)
    print_headline(flags)
    rows = take_turns(__file__, [side.__name__ for side in (*supervised, *on_request)], flags)
    rows |= take_turns(__file__, [side.__name__ for side in (*guided_sides, guided_compiled)], flags)
    columns = ["step", *PARTS, "peak GiB"]
    print_table("seconds", rows, [*columns, "pseudo-labels"])
    if "hugging_face" in rows:
        print_table("relative", ratios(rows), columns, digits=2)


if __name__ == "__main__":
    main()
