"""One training step (forward, losses, backward) of ours beside Hugging Face's Mask2Former: the same weights,
images and targets; processes that take turns, each as a user would start it.

    python bench/step.py                          # 512 x 512, 2 images, 7 objects each, R50
    python bench/step.py --size 256 --rounds 9
    python bench/step.py --allocator              # all with the allocator told to keep what is freed
    python bench/step.py --only ours ours_plain ours_compiled
    python bench/step.py --device cuda --size 1024 --only ours theirs ours_bf16 theirs_bf16 guided_bf16

It prints medians, peak memory, where the time goes, and what share of theirs it is. On a CPU theirs runs in
fp32, ours in fp32 and in bf16. "guided" is the guided step of ours: as many labelled and unlabelled images, a
teacher, the optimiser and the EMA."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from sides import (
    CLASSES,
    Clock,
    headline,
    load_ours,
    load_theirs,
    make_batch,
    normalised,
    parse,
    ratios,
    table,
    take_turns,
)

import engine
import model
from burnin import guided_step, to_device
from distill import ema_update
from matcher import SetCriterion

PARTS = ["backbone", "pixel_decoder", "decoder", "losses", "backward"]


def batch_on(device, flags):
    images, targets = make_batch(flags.size, flags.batch, flags.objects)
    return images.to(device), to_device(targets, device)


def ours(flags, precision="fp32", compiled=False):
    device = engine.start_processes(flags.device, precision)
    images, targets = batch_on(device, flags)
    student, criterion = load_ours(flags.folder).train().to(device), SetCriterion(CLASSES).to(device)
    parts = dict(backbone=student.backbone, pixel_decoder=student.pixel_decoder, decoder=student.decoder)
    clock = Clock(device, losses=criterion, **({} if compiled else parts))
    called = torch.compile(student) if compiled else student

    def step():
        student.zero_grad(set_to_none=True)
        with engine.autocast(device):
            outputs = called(images)
        loss = sum(criterion(outputs, targets).values())
        with clock("backward"):
            loss.backward()

    return step, clock


def ours_bf16(flags):
    return ours(flags, "bf16")


def ours_plain(flags):
    """As on a CPU without AVX-512: channels first, matrix products for all tokens."""
    model.AVX512 = False
    return ours(flags)


def ours_compiled(flags):
    step, clock = ours(flags, "fp32" if flags.device == "cpu" else "bf16", compiled=True)
    step()  # compiles, for minutes
    return step, clock


def theirs(flags, precision="fp32"):
    device = engine.start_processes(flags.device, precision)
    images, targets = batch_on(device, flags)
    peer = load_theirs(flags.folder).train().to(device)
    parts = peer.model
    for name, parameter in parts.pixel_level_module.encoder.named_parameters():
        parameter.requires_grad_("bn" not in name and "downsample.1" not in name)  # frozen, as officially
    for module in parts.pixel_level_module.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    clock = Clock(
        device,
        backbone=parts.pixel_level_module.encoder,
        pixel_decoder=parts.pixel_level_module.decoder,
        decoder=parts.transformer_module,
        losses=peer.criterion,
    )
    labels, masks = [t["labels"] for t in targets], [t["masks"].float() for t in targets]

    def step():
        peer.zero_grad(set_to_none=True)
        with engine.autocast(device):
            loss = peer(pixel_values=normalised(images), mask_labels=masks, class_labels=labels).loss
        with clock("backward"):
            loss.backward()

    return step, clock


def theirs_bf16(flags):
    """With autocast around the forward pass and the losses, as a user would try it."""
    return theirs(flags, "bf16")


def guided(flags, precision="fp32", parts=1):
    """The step of phase 3: losses on labelled and unlabelled images, backward, optimiser, EMA."""
    device = engine.start_processes(flags.device, precision)
    images, targets = make_batch(flags.size, flags.batch, flags.objects)
    others, _ = make_batch(flags.size, flags.unlabelled or flags.batch, 0, seed=1)
    student, criterion = load_ours(flags.folder).train().to(device), SetCriterion(CLASSES).to(device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = engine.make_optimizer(student, 1e-4, 0.05, 0.1)
    # An untrained teacher is sure of little: the threshold leaves as many pseudo-labels as there are objects.
    with torch.no_grad(), engine.autocast(device):
        scores, labels = teacher(others.to(device))["pred_logits"].float().softmax(-1).max(-1)
    sure = scores[labels < CLASSES].sort(descending=True).values
    threshold = float(sure[: flags.objects * len(others) + 1][-1])
    more = dict(mask_threshold=0.0, max_overlap=1.0, fine_masks=False, pixel_weights=False, score_power=0.0)
    cfg, clock = SimpleNamespace(score_threshold=threshold, min_area=5, **more), Clock(device)
    labelled = [{"image": image, **target} for image, target in zip(images, targets)]
    unlabelled = [{"image": image, "strong": image} for image in others]

    called = engine.InParts(student, parts) if parts > 1 else student

    def step():
        losses, guided_losses, pseudo = guided_step(
            called, teacher, criterion, labelled, unlabelled, cfg, device
        )
        optimizer.zero_grad(set_to_none=True)
        (sum(losses.values()) + 2 * sum(guided_losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.01)
        optimizer.step()
        ema_update(teacher, student, 0.9996)
        return {"pseudo-labels": sum(len(target["labels"]) for target in pseudo)}

    return step, clock


def guided_bf16(flags):
    return guided(flags, "bf16")


def guided_in_parts(flags):
    """With --accumulate of one image."""
    return guided(flags, "fp32", parts=2 * flags.batch)


def main():
    single, whole = (ours, theirs, ours_bf16), (guided, guided_bf16, guided_in_parts)
    more = ours_plain, ours_compiled, theirs_bf16  # when asked for
    sides = {side.__name__: side for side in (*single, *whole, *more)}
    usual = [side.__name__ for side in (*single, *whole)]
    flags = parse(__doc__, sides, usual, unlabelled=0)  # 0: as many as labelled ones
    headline(flags)
    rows = take_turns(__file__, [side.__name__ for side in (*single, *more)], flags)
    rows |= take_turns(__file__, [side.__name__ for side in whole], flags)
    names = ["step", *PARTS, "peak GiB"]
    table("seconds", rows, [*names, "pseudo-labels"])
    if "theirs" in rows:
        table("of theirs", ratios(rows), names, digits=2)


if __name__ == "__main__":
    main()
