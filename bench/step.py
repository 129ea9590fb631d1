"""One training step (forward, losses, backward) of ours beside Hugging Face's Mask2Former: the same weights,
images and targets; two processes that take turns, each as a user would start it.

    python bench/step.py                          # 512 x 512, 2 images, 7 objects each, R50
    python bench/step.py --size 256 --rounds 9
    python bench/step.py --allocator              # both with the allocator told to keep what is freed

It prints medians, their ratio, peak memory, and where the time goes. Below that, the guided step of ours: as
many labelled and unlabelled images, a teacher, the optimiser and the EMA."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}
CLASSES = 80


def make_batch(size: int, batch: int, objects: int, seed: int = 0):
    """Images (B, 3, H, W) uint8, and per image labels (N,) and masks (N, H, W) bool: ellipses."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator)

    images = (255 * rand(batch, 3, size, size)).to(torch.uint8)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    targets = []
    for _ in range(batch):
        centre, radius = size * rand(objects, 2, 1, 1), size * (0.03 + 0.2 * rand(objects, 2, 1, 1))
        masks = ((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2 < 1
        labels = (CLASSES * rand(objects)).long()
        targets.append({"labels": labels, "masks": masks})
    return images, targets


class Clock:
    """Seconds within the forward pass of modules, by name."""

    def __init__(self, **modules):
        self.seconds = {}
        for name, module in modules.items():
            module.register_forward_pre_hook(lambda *_, name=name: self.start(name))
            module.register_forward_hook(lambda *_, name=name: self.stop(name))

    def start(self, name):
        self.started = name, time.perf_counter()

    def stop(self, name):
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.started[1]


def ours(folder, images, targets, precision="fp32"):
    import engine
    from matcher import SetCriterion
    from model import Mask2Former, convert_state_dict
    from weights import _read

    device = engine.start_processes("cpu", precision)
    model = Mask2Former(CLASSES, "resnet50").train()
    model.load_state_dict(convert_state_dict(_read(folder / "model.safetensors")))
    criterion = SetCriterion(CLASSES)
    clock = Clock(
        backbone=model.backbone, pixel_decoder=model.pixel_decoder, decoder=model.decoder, losses=criterion
    )

    def step():
        model.zero_grad(set_to_none=True)
        with engine.autocast(device):
            outputs = model(images)
        sum(criterion(outputs, targets).values()).backward()

    return step, clock, model


def ours_bf16(folder, images, targets):
    return ours(folder, images, targets, "bf16")


def theirs(folder, images, targets):
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(folder).train()
    parts = model.model
    for name, parameter in parts.pixel_level_module.encoder.named_parameters():
        parameter.requires_grad_("bn" not in name and "downsample.1" not in name)  # frozen, as officially
    for module in parts.pixel_level_module.encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    clock = Clock(
        backbone=parts.pixel_level_module.encoder,
        pixel_decoder=parts.pixel_level_module.decoder,
        decoder=parts.transformer_module,
        losses=model.criterion,
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))
    labels, masks = [t["labels"] for t in targets], [t["masks"].float() for t in targets]

    def step():
        model.zero_grad(set_to_none=True)
        pixels = (images - mean) / std
        model(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss.backward()

    return step, clock, model


def guided(folder, images, targets, precision="fp32"):
    """The step of phase 3: losses on labelled and unlabelled images, backward, optimiser, EMA."""
    import copy
    from types import SimpleNamespace

    import engine
    from burnin import guided_step
    from distill import ema_update
    from matcher import SetCriterion

    _, clock, student = ours(folder, images, targets, precision)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    teacher._forward_hooks.clear()
    criterion, optimizer = SetCriterion(CLASSES), engine.make_optimizer(student, 1e-4, 0.05, 0.1)
    # An untrained teacher is sure of little: the threshold leaves as many pseudo-labels as there are objects.
    with torch.no_grad():
        scores, labels = teacher(images)["pred_logits"].softmax(-1).max(-1)
    sure = scores[labels < CLASSES].sort(descending=True).values
    count = sum(len(target["labels"]) for target in targets)
    cfg = SimpleNamespace(score_threshold=float(sure[:count][-1]) - 1e-6, min_area=5)
    labelled = [{"image": image, **target} for image, target in zip(images, targets)]
    unlabelled = [{"image": image, "strong": image} for image in images.flip(0)]

    def step():
        device = torch.device("cpu")
        losses, guided_losses, _ = guided_step(student, teacher, criterion, labelled, unlabelled, cfg, device)
        optimizer.zero_grad(set_to_none=True)
        (sum(losses.values()) + 2 * sum(guided_losses.values())).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 0.01)
        optimizer.step()
        ema_update(teacher, student, 0.9996)

    return step, Clock(), student


def guided_bf16(folder, images, targets):
    return guided(folder, images, targets, "bf16")


SIDES = {side.__name__: side for side in (ours, ours_bf16, theirs, guided, guided_bf16)}


def work(side, folder, flags):
    """A side's process: a step for every line on standard input."""
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    step, clock, _ = SIDES[side](Path(folder), *make_batch(flags.size, flags.batch, flags.objects))
    print(json.dumps("ready"), flush=True)
    for _ in sys.stdin:
        clock.seconds.clear()
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
        print(json.dumps({"seconds": seconds, "parts": clock.seconds, "peak": peak}), flush=True)


def start(side, folder, flags):
    arguments = [sys.executable, __file__, "--side", side, "--folder", folder]
    for name in ("size", "batch", "objects", "threads"):
        arguments += [f"--{name}", str(getattr(flags, name))]
    environment = os.environ | (KEEP if flags.allocator else {})
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    answer(process)
    return process


def answer(process):
    line = process.stdout.readline()
    if not line:
        sys.exit(f"a side ended with code {process.wait()}")
    return json.loads(line)


def ask(process):
    process.stdin.write("step\n")
    process.stdin.flush()
    return answer(process)


def summary(results):
    parts = {
        name: statistics.median(r["parts"].get(name, 0.0) for r in results) for name in results[0]["parts"]
    }
    seconds = statistics.median(r["seconds"] for r in results)
    parts["backward"] = seconds - sum(parts.values())
    return seconds, max(r["peak"] for r in results), parts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--objects", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--allocator", action="store_true", help="both keep freed memory (environment variables)"
    )
    parser.add_argument("--only", choices=SIDES, help="time this side alone")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.side:
        return work(flags.side, flags.folder, flags)
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, TimmBackboneConfig
    from transformers import __version__ as version

    print(f"R50, {flags.batch} images of {flags.size} x {flags.size}, {flags.objects} objects each")
    print(f"{flags.threads} threads, torch {torch.__version__}, transformers {version}")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        backbone = TimmBackboneConfig(backbone="resnet50", out_indices=(1, 2, 3, 4))
        config = Mask2FormerConfig(backbone_config=backbone, num_labels=CLASSES, dropout=0.0)
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
        chosen = [flags.only] if flags.only else list(SIDES)
        rows = {}
        for group in (("ours", "theirs", "ours_bf16"), ("guided", "guided_bf16")):
            processes = {side: start(side, folder, flags) for side in group if side in chosen}
            results = {side: [] for side in processes}
            for number in range(flags.rounds + 1):
                for side, process in processes.items():
                    result = ask(process)
                    if number:  # the first warms up
                        results[side].append(result)
            for process in processes.values():
                process.stdin.close()
                process.wait()
            rows |= {side: summary(result) for side, result in results.items()}
    names = ["backbone", "pixel_decoder", "decoder", "losses", "backward"]
    print(f"\n{'seconds':12}{'step':>9}" + "".join(f"{name:>15}" for name in names) + f"{'peak GiB':>12}")
    for side, (seconds, peak, parts) in rows.items():
        columns = "".join(f"{parts[n]:15.3f}" if len(parts) > 1 else " " * 15 for n in names)
        print(f"{side:12}{seconds:9.3f}{columns}{peak:12.2f}")
    if flags.only:
        return
    print("\nof theirs")
    seconds, peak, parts = rows.pop("theirs")
    for side, (mine, my_peak, my_parts) in rows.items():
        columns = "".join(f"{my_parts[n] / parts[n]:15.2f}" if len(my_parts) > 1 else " " * 15 for n in names)
        print(f"{side:12}{mine / seconds:9.2f}{columns}{my_peak / peak:12.2f}")


if __name__ == "__main__":
    main()
