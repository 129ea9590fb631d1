"""The optimizer, the learning-rate schedule, and the guard against gradients that are not finite."""

import math
import sys

import torch
from torch import Tensor, nn

from data import stable_seed
from training.cli import exit_with_error
from training.config import Config
from training.distributed import any_rank, rank

MAX_SKIPPED_STEPS = 10  # in a row


def build_optimizer(model: nn.Module, cfg: Config, lr_factor: float = 1.0) -> torch.optim.AdamW:
    """Build AdamW with the parameter groups of Mask2Former: the backbone learns at lr *
    backbone_lr_factor, and norms, embeddings and position tables have no weight decay. lr_factor
    multiplies all learning rates."""
    no_decay = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.Embedding)
    groups = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if not parameter.requires_grad:
                continue
            in_backbone = name.startswith("backbone.")
            position_table = "relative_position_bias_table" in name or "pos_embed" in name
            decays = not (isinstance(module, no_decay) or position_table)
            groups.setdefault((in_backbone, decays), []).append(parameter)
    options = []
    for (in_backbone, decays), parameters in groups.items():
        lr = lr_factor * cfg.lr * (cfg.backbone_lr_factor if in_backbone else 1.0)
        weight_decay = cfg.weight_decay if decays else 0.0
        options.append({"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": weight_decay})
    return torch.optim.AdamW(options, fused=next(model.parameters()).device.type in ("cuda", "cpu"))


def load_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load the moments of another phase's optimizer, but keep the learning rates and weight decays."""
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options):
        group.update(own)


def lr_multiplier(schedule: str, progress: float) -> float:
    """Return the learning-rate multiplier at `progress` in [0, 1] of the schedule.

    "poly": (1 - progress) ** 0.9. "step": times 0.1 at the fractions of Mask2Former's COCO schedule, 327,778
    and 355,092 of 368,750 steps. "cosine": linear warmup over the first 5 %, then half a cosine.
    Raises ValueError for another name."""
    if schedule == "poly":
        return (1 - progress) ** 0.9
    if schedule == "step":
        return 0.1 ** sum(progress >= drop / 368_750 for drop in (327_778, 355_092))
    if schedule == "cosine":
        warmup = 0.05
        if progress < warmup:
            return max(progress, 1e-3) / warmup  # above zero, so that the first step counts
        return 0.5 + 0.5 * math.cos(math.pi * (progress - warmup) / (1 - warmup))
    raise ValueError(f"unknown schedule {schedule!r}; choose one of poly, step, cosine")


def set_lr(optimizer: torch.optim.Optimizer, schedule: str, progress: float) -> None:
    """Set the learning rate of all groups at `progress` in [0, 1] of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_multiplier(schedule, progress)


def seed_step(seed: int, phase: str, step: int) -> None:
    """Seed the random points of a step on this rank, so that no generator has a state to be saved."""
    torch.manual_seed(stable_seed(seed, phase, step, rank()))


class GuardedStep:
    """Clip the gradient norm of the whole model and step the optimizer. If any rank's gradient is
    non-finite, all ranks skip the step, and trained batch norms get back the statistics they had before
    it. MAX_SKIPPED_STEPS in a row exit with code 3."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float):
        self.model, self.optimizer, self.max_norm = model, optimizer, max_norm
        batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [
            v for m in batch_norms if m.track_running_stats for v in (m.running_mean, m.running_var)
        ]
        self.finite_statistics = [value.clone() for value in self.statistics]
        self.skipped = 0  # in a row

    def __call__(self, where: str, losses: dict[str, Tensor], files: list[str]) -> bool:
        """Return whether the step was made. `where`, the losses and the batch's files are for the warning."""
        grad_norm = nn.utils.get_total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        # DDP averages gradients, so ranks should agree; one that skipped alone would make the others wait.
        skip = any_rank(not grad_norm.isfinite())
        if self.statistics:  # the forward pass has updated them
            source, target = self.statistics, self.finite_statistics
            torch._foreach_copy_(*((source, target) if skip else (target, source)))
        if skip:
            self._warn(where, losses, files)
            return False
        if self.max_norm:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_norm, grad_norm)
        self.optimizer.step()
        self.skipped = 0
        return True

    def _warn(self, where, losses, files) -> None:
        self.skipped += 1
        names = ", ".join(name for name, loss in losses.items() if not loss.isfinite())
        if names or rank() == 0:
            paths = ", ".join(map(repr, files))
            cause = (
                f"{names} not finite, images of the step: {paths}" if names else "the gradient is not finite"
            )
            print(f"warning: {where}, rank {rank()}: {cause}; skipping the step", file=sys.stderr, flush=True)
        if self.skipped == MAX_SKIPPED_STEPS:
            advice = "the last checkpoint before them is kept; try a lower --lr or --precision fp32"
            exit_with_error(f"{self.skipped} steps in a row were not finite; {advice}", code=3)
