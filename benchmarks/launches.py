"""Count the operations of a guided training step, each of which a GPU would have to launch. Needs no GPU.

    python benchmarks/launches.py              # R50, 100 queries, 2 + 2 images, bf16
    python benchmarks/launches.py --compiled   # the model after torch.compile, in some minutes

A GPU that is faster than its launches waits for them, so their number is a time. The step is run on a CPU, on
images of 64 x 64: the number of operations does not depend on their size. What a GPU would do differently is
emulated:

- Autocast casts as on CUDA: normalizations, softmax and sums are in fp32, for instance.
- Deformable attention counts as one launch forward and two backward (deform_attn_triton.py).
- Model and loss take the code paths that they take on a GPU, such as one chunk in the matcher.
- Views are free. A convolution's backward pass has a launch for each gradient, a normalization's has two.
- Copies between host and device are not counted, nor are kernels that cuDNN or sort() add.
- Compiled, a launch is a node that the scheduler of TorchInductor is left with after fusion for a CPU. The
  second number is with its option combo_kernels, which launches up to eight independent ones at once."""

import argparse
import copy
import functools
import math
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._inductor import scheduler
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import NUM_CLASSES, make_batch

import matcher
import model
from burnin import merge_losses, pseudo_labels
from distill import ema_update
from matcher import SetCriterion
from model import Mask2Former
from training.config import Config
from training.distributed import Env, autocast
from training.micro_batches import split_outputs
from training.optimization import GuardedStep, build_optimizer

ON_HOST = "on the host, not counted"
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
FREE |= {"lift_fresh", "_local_scalar_dense", "is_same_size", "_reshape_alias"}
TWO_KERNELS = {"native_layer_norm_backward", "native_group_norm", "native_group_norm_backward"}
# Functions whose inputs CUDA's autocast casts to fp32. Those of the step; the CPU's list is shorter.
FP32 = {
    F.layer_norm,
    F.group_norm,
    F.softmax,
    torch.softmax,
    torch.Tensor.softmax,
    torch.Tensor.sum,
    torch.sum,
}
FP32 |= {torch.layer_norm, torch.group_norm, F.softplus, torch.Tensor.pow, torch.cumsum, torch.Tensor.cumsum}


class CudaAutocast(TorchFunctionMode):
    """Cast the inputs of FP32 to fp32 while autocast is enabled."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FP32 and torch.is_autocast_enabled("cpu"):
            args = [
                x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in args
            ]
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class CountLaunches(TorchDispatchMode):
    """Count the launches in `counts`, by the part that runs."""

    def __init__(self):
        super().__init__()
        self.counts, self.names, self.part = Counter(), Counter(), ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        number = launches(func, args)
        self.counts[self.part] += number
        self.names[self.part, func.name()] += number
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(number for part, number in self.counts.items() if part != ON_HOST)

    def follow(self, owner, name: str, part: str) -> None:
        """Count a method as a part of its own."""
        method = getattr(owner, name)

        def counted(*args, **kwargs):
            outer, self.part = self.part, part
            result = method(*args, **kwargs)
            self.part = outer
            return result

        setattr(owner, name, counted)

    def begin(self, part: str, node) -> None:
        """Let a part begin when the backward pass reaches a node of the graph."""
        node.register_prehook(lambda _: setattr(self, "part", part))


def launches(func, args) -> int:
    """Return how many launches an operation takes."""
    namespace, name = func._schema.name.split("::")
    is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    if is_view or name in FREE or namespace != "aten":
        return 0
    if name == "convolution_backward":
        return sum(args[-1])  # whether the gradients of input, weight and bias are needed
    return 2 if name in TWO_KERNELS else 1


class DeformableAttention(torch.autograd.Function):
    """Stand in for deform_attn_triton.py: results of the right shapes, one launch forward, two backward."""

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        ctx.save_for_backward(value, locations, weights)
        (B, _, M, D), N = value.shape, locations.shape[1]
        return value.new_zeros(B, N, M * D)

    @staticmethod
    def backward(ctx, grad):
        value, locations, weights = ctx.saved_tensors
        grads = torch._foreach_mul([value, locations, weights], 0)
        return torch.zeros_like(value), None, *grads[1:]


def as_on_a_gpu():
    """Let the model and the loss take the code paths that they take on a GPU."""
    model.prefers_channels_last = lambda x: True
    model.linear = F.linear
    model.fastest_ms_deform_attn = lambda device: DeformableAttention.apply
    matcher.MAX_LOGITS_PER_CHUNK["cpu"] = matcher.MAX_LOGITS_PER_CHUNK["cuda"]


def count_guided_step(num_images: int = 2, size: int = 64, **model_args) -> CountLaunches:
    """Count the launches of a guided step with num_images labeled and as many unlabeled images."""
    torch.manual_seed(0)
    as_on_a_gpu()
    env, count = Env(torch.device("cpu"), bf16=True), CountLaunches()
    student = Mask2Former(NUM_CLASSES, **model_args).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    criterion, cfg = SetCriterion(NUM_CLASSES), Config(score_threshold=0.0, min_area=0)
    optimizer = build_optimizer(student, cfg)
    clip_and_step = GuardedStep(student, optimizer, cfg.clip_grad_norm)
    images, targets = make_batch(size, num_images, objects=7)
    unlabeled, _ = make_batch(size, num_images, objects=7, seed=1)

    def follow(name, network):
        """Count the forward passes of the parts of a network. Returns the tensors where parts end."""
        ends = {}
        for part in ("backbone", "pixel_decoder", "decoder"):
            module = getattr(network, part)
            module.register_forward_pre_hook(
                lambda *_, part=part: setattr(count, "part", f"{name} forward, {part}")
            )
            module.register_forward_hook(lambda m, x, y, part=part: ends.update({part: y}))
        return ends

    follow("teacher", teacher)
    ends = follow("student", student)
    count.follow(criterion.matcher, "match", "matching")
    count.follow(criterion, "matched_indices", ON_HOST)

    def step():
        # Not inference mode, in which casts and convolutions are not told apart.
        with torch.no_grad(), autocast(env):
            teacher_outputs = teacher(unlabeled)
        count.part = "pseudo-labels"
        pseudo = pseudo_labels(teacher_outputs, cfg.score_threshold, cfg.min_area)
        pseudo = [{name: value[:7] for name, value in target.items()} for target in pseudo]
        count.part = "student forward, backbone"
        with autocast(env):
            outputs = student(torch.cat([images, unlabeled]))
        count.part = "losses"
        outputs_x, outputs_u = split_outputs(outputs, num_images)
        losses_x, losses_u = criterion(outputs_x, targets), criterion(outputs_u, pseudo)
        loss = sum(losses_x.values()) + cfg.unsupervised_weight * sum(losses_u.values())
        count.begin("student backward, decoder", outputs["mask_embed"].grad_fn)
        count.begin("student backward, pixel_decoder", outputs["mask_features"].grad_fn)
        count.begin("student backward, backbone", ends["backbone"][-1].grad_fn)
        count.part = "losses backward"
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        count.part = "clipping, optimizer, EMA"
        clip_and_step("count", merge_losses(losses_x, losses_u), [])
        ema_update(teacher, student, cfg.ema_decay)

    step()  # makes the state of the optimizer
    with count, CudaAutocast():
        step()
    return count


def count_compiled(network, images) -> list[tuple[int, int]]:
    """Count the launches of a compiled model, without and with combo_kernels: [forward, backward], or
    [forward] for a teacher. The kernels are generated but not built; the graph runs as it was before."""
    counts = []

    def compile_graph(graph, inputs, **kwargs):
        copied = torch.fx.Graph()
        copied.output(copied.graph_copy(graph.graph, {}))
        runnable = torch.fx.GraphModule(graph, copied)
        compile_fx_inner(graph, inputs, **kwargs)
        return make_boxed_func(runnable.forward)

    generate = scheduler.Scheduler.codegen

    def count_and_generate(self):
        counts.append((sum(map(launches_of_node, self.nodes)), launches_in_groups(self)))
        return generate(self)

    backend = functools.partial(compile_fx, inner_compile=compile_graph)
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        mock.patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: lambda *_: None),
        mock.patch.object(scheduler.Scheduler, "codegen", count_and_generate),
    ):
        called = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
        with torch.set_grad_enabled(network.training), torch.autocast("cpu", torch.bfloat16):
            outputs = called(images)
        if network.training:
            tensors = [x for x in tree_leaves(outputs) if x.requires_grad]
            torch.autograd.backward(tensors, [torch.zeros_like(x) for x in tensors])
    torch.compiler.reset()
    return counts


def tree_leaves(outputs) -> list:
    """Return the tensors of `Outputs`, dictionaries and lists."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.stored.values() if isinstance(outputs, model.Outputs) else outputs
    return [x for part in parts for x in tree_leaves(part)]


def launches_of_node(node) -> int:
    """Return how many launches a node of TorchInductor's scheduler takes."""
    if isinstance(node, scheduler.ExternKernelSchedulerNode):
        name = getattr(node.node, "python_kernel_name", None) or ""
        if "convolution_backward" in name or "ms_deform_attn_cpu_backward" in name:
            return 2
        return 0 if type(node.node).__name__ == "MultiOutput" else 1
    return 0 if isinstance(node, scheduler.NopKernelSchedulerNode) else 1


def launches_in_groups(schedule, size: int = 8) -> int:
    """Return the launches of a schedule if kernels that do not depend on each other run in groups."""
    total = 0
    for level in schedule._topological_sort_nodes():
        others = scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode
        kernels = [node for node in level if not isinstance(node, others)]
        grouped = len(scheduler.ForeachKernelSchedulerNode.combinable_nodes(kernels))
        total += sum(map(launches_of_node, level)) - grouped + math.ceil(grouped / size)
    return total


def print_compiled(count: CountLaunches, num_images: int) -> None:
    """Print the launches of the compiled model, and of the step with it."""
    student = Mask2Former(NUM_CLASSES).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    images = make_batch(64, num_images, objects=0)[0]
    forward, backward = count_compiled(student, torch.cat([images, images]))
    [teacher_forward] = count_compiled(teacher, images)
    eager = sum(n for part, n in count.counts.items() if part.split()[0] not in ("student", "teacher"))
    rows = {"teacher forward": teacher_forward, "student forward": forward, "student backward": backward}
    rows["all else"] = (eager - count.counts[ON_HOST],) * 2
    rows["all"] = tuple(map(sum, zip(*rows.values())))
    for part, (number, grouped) in rows.items():
        print(f"compiled: {part:22}{number:6}{grouped:6}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2, help="labeled images, and as many unlabeled")
    parser.add_argument("--operations", action="store_true", help="also list the operations of each part")
    parser.add_argument("--compiled", action="store_true", help="also count with a compiled model")
    flags = parser.parse_args()
    count = count_guided_step(flags.images)
    for part, number in count.counts.items():
        print(f"{part:32}{number:6}")
        names = {name: n for (p, name), n in count.names.most_common() if p == part and n}
        if flags.operations:
            print("".join(f"    {name:40}{n:6}\n" for name, n in names.items()), end="")
    print(f"{'all':32}{count.total:6}")
    if flags.compiled:
        print_compiled(count, flags.images)


if __name__ == "__main__":
    main()
