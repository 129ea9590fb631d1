"""Processes that train or evaluate, and the faults to inject into them. test_fault_tolerance.py starts them.

The processes are forked from a server that has imported everything, so they start without delay."""

import atexit
import hashlib
import multiprocessing
import os
import resource
import shlex
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_tools

import burnin
import data
import distill
import evaluate
from training import checkpoint, run_data, setup
from training.optimization import GuardedStep

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"  # where the server looks for modules
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["faults", "tools.report"])

TINY = shlex.split(
    "--preset shapes --ratio 0.5 --crop 64,64 --num-queries 6 --hidden-dim 32 --encoder-ffn 32 "
    "--decoder-layers 1 --decoder-ffn 32 --num-points 32 --batch 6 --log-every 1 --save-every 2 "
    "--val-ratio 0 "
    """--score-threshold 0.3 --device cpu --backbone-args '{"stem_type": "", "channels": [8, 8, 16, 16]}'"""
)


class Job:
    """The processes of one run, started as torchrun would start them.

    Args:
        folder: for the logs, log-<rank>.txt.
        flags: the command line.
        fault: (name, *arguments): each process first calls the function below with (rank, *arguments).
        script: "distill" or "evaluate"."""

    def __init__(self, folder, *flags, processes=1, fault=(), script="distill"):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"log-{rank}.txt" for rank in range(processes)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        environment = environment if processes > 1 else {}
        arguments = [str(flag) for flag in flags]
        self.processes = [
            context.Process(target=start, args=(script, arguments, rank, environment, log, fault))
            for rank, log in enumerate(self.logs)
        ]
        for log in self.logs:
            log.write_text("")
        for process in self.processes:
            process.start()

    def wait(self, seconds=60) -> list[int]:
        """Return the exit codes, negative for processes that a signal killed. Raises AssertionError if a
        process is still alive after `seconds`."""
        end = time.time() + seconds
        for process in self.processes:
            process.join(max(0, end - time.time()))
        hanging = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not hanging, f"{len(hanging)} processes hang\n{self.text()}"
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def text(self, rank=None) -> str:
        """Return what one rank, or all of them, have printed."""
        return "".join(log.read_text() for i, log in enumerate(self.logs) if rank in (None, i))

    def wait_for(self, words, rank=0, seconds=60) -> bool:
        """Wait until a rank has printed `words`, and return whether it has."""
        end = time.time() + seconds
        while time.time() < end and self.processes[rank].is_alive() and words not in self.text(rank):
            time.sleep(0.005)
        return words in self.text(rank)


def start(script, arguments, rank, environment, log, fault):
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if environment:
        os.environ |= {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default for loaders on Linux
    code = 0
    try:
        if fault:
            globals()[fault[0]](rank, *fault[1:])
        {"distill": distill.main, "evaluate": evaluate.main}[script](arguments)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # a process of multiprocessing does not run them
    os._exit(code)


# ------------------------------------------------------------------------------------------------ faults


def patch_phases(name, function):
    """Replace a function that the loops of burnin.py and distill.py both import."""
    for script in (burnin, distill):
        setattr(script, name, function)


def at_step(rank, who, phase, step, action):
    """Rank `who` raises an error, or sends itself a signal, before the optimizer's step `step` (from 0) of a
    phase."""
    optimizer_step = GuardedStep.__call__

    def faulty(self, where, *arguments):
        if (rank, where) == (who, f"{phase} step {step + 1}"):
            print("fault:", action, flush=True)
            if action == "raise":
                raise KeyError("planted")
            os.kill(os.getpid(), getattr(signal, action))
        return optimizer_step(self, where, *arguments)

    GuardedStep.__call__ = faulty


def not_finite(rank, who, phase, steps):
    """Rank `who` trains on images of NaN in these steps (from 0) of a phase."""
    seed_step, to_device = burnin.seed_step, burnin.to_device
    now = []

    def remember(seed, phase, step):
        now[:] = phase, step
        seed_step(seed, phase, step)

    def faulty(batch, env):
        batch = to_device(batch, env)
        if rank == who and now in [[phase, step] for step in steps]:
            batch |= {name: batch[name] * float("nan") for name in ("image", "strong") if name in batch}
        return batch

    patch_phases("seed_step", remember)
    patch_phases("to_device", faulty)


def loader(rank, who, kind):
    """A loader process of rank `who` dies or gets stuck after some images. The timeout is 3 seconds."""
    run_data.LOADER_TIMEOUT = 3.0
    get, count = data.AugmentedDataset.__getitem__, []

    def faulty(views, key):
        count.append(key)
        if rank == who and torch.utils.data.get_worker_info() and len(count) > 10:
            print("fault: loader", kind, flush=True)
            os.kill(os.getpid(), signal.SIGKILL) if kind == "dead" else time.sleep(1000)
        return get(views, key)

    data.AugmentedDataset.__getitem__ = faulty


def slow_evaluation(rank, seconds, who=None):
    """Each batch of an evaluation takes some seconds longer, on all ranks or on one."""
    predict_batch = evaluate.predict_batch
    if who not in (None, rank):
        return

    def slow(*arguments):
        print("evaluating", flush=True)
        time.sleep(seconds)
        return predict_batch(*arguments)

    evaluate.predict_batch = slow


def slow_step(rank, phase, step):
    """A step (from 0) of a phase does many long operations."""
    optimizer_step = GuardedStep.__call__

    def slow(self, where, *arguments):
        if where == f"{phase} step {step + 1}":
            print("a slow step", flush=True)
            for _ in range(50):
                sum(range(10**7))
        return optimizer_step(self, where, *arguments)

    GuardedStep.__call__ = slow


def streams_from_the_start(rank):
    """A resumed run reads its batches from step 0."""
    endless_batches = run_data.endless_batches
    run_data.endless_batches = lambda *arguments, first_step, **kwargs: endless_batches(*arguments, **kwargs)


def no_space(rank, phase, step):
    """From a checkpoint on, no file may grow beyond 100 kB."""
    save = checkpoint.Checkpointer.save

    def faulty(self, path, at, **results):
        if (self.phase, at) == (phase, step):
            print("fault: no space", flush=True)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return save(self, path, at, **results)

    checkpoint.Checkpointer.save = faulty


def stale(rank, what):
    """Rank 1 does not see what rank 0 has written to the folder that they share: checkpoints of a running
    phase, or completed phases."""
    print("fault: stale", what, flush=True)
    if rank == 1 and what == "running":
        checkpoint.latest_checkpoint = lambda *_: (None, None)
    if rank == 1 and what == "completed":
        checkpoint.PHASES = ()


def nobody(rank):
    """The process runs as a user without permissions. Root could write everywhere."""
    lock = setup.lock

    def by_nobody(folder):
        if os.getuid() == 0:
            os.seteuid(65534)
        print("fault: user", os.geteuid(), flush=True)
        lock(folder)

    setup.lock = by_nobody


def noisy_truth(rank):
    """An evaluation scores, beside the model's predictions, the ground truth with noise: moved objects, some
    with a wrong class. The noise depends on the image alone, not on the rank that evaluates it."""
    coco_results, load_data, mask_ap = evaluate.coco_results, evaluate.load_data, evaluate.mask_ap
    truth = []

    def noisy(image_id, result, category_ids):
        detections, rng = coco_results(image_id, result, category_ids), np.random.default_rng(image_id)
        print("image", image_id, flush=True)
        for o in truth[0].objects(image_id):
            mask = mask_tools.decode(data.encode_rle(o["segmentation"], *truth[0].size(image_id)))
            rle = mask_tools.encode(np.asfortranarray(np.roll(mask, rng.integers(0, 5), axis=0)))
            category = rng.choice(category_ids) if rng.random() < 0.2 else o["category_id"]
            entry = {"image_id": image_id, "category_id": int(category), "segmentation": rle}
            detections.append(entry | {"score": float(rng.random())})
        return detections

    def remember(*args, **kwargs):
        train, val = load_data(*args, **kwargs)
        truth.append(val)
        return train, val

    def digested(dataset, detections):
        order = sorted(detections, key=lambda d: (d["image_id"], d["score"]))
        digest = hashlib.sha256(repr([(d["score"], d["segmentation"]) for d in order]).encode())
        print("detections", len(order), digest.hexdigest(), flush=True)
        return mask_ap(dataset, detections)

    evaluate.coco_results, evaluate.load_data, evaluate.mask_ap = noisy, remember, digested


def few_objects(rank):
    """Rank 1 has labeled images without objects, and a teacher that finds nothing."""
    if rank != 1:
        return
    to_device, pseudo_labels = burnin.to_device, burnin.pseudo_labels

    def without_objects(batch, env):
        batch = to_device(batch, env)
        if "targets" in batch:
            batch["targets"] = [{name: v[:0] for name, v in target.items()} for target in batch["targets"]]
        return batch

    patch_phases("to_device", without_objects)
    patch_phases("pseudo_labels", lambda outputs, *_: pseudo_labels(outputs, score_threshold=2.0))
    print("fault: no objects", flush=True)
