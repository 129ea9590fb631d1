"""Processes that train or evaluate, and what can befall them: the part of test_faults.py that runs in them.

They are forked from a server that has imported everything, so that one starts in no time."""

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
import engine
import evaluate
import setting

HERE = Path(__file__).parent
os.environ["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{HERE}"  # where the server looks for modules
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["faults", "tools.report"])

TINY = shlex.split(
    "--preset shapes --ratio 0.5 --crop 64,64 --num-queries 6 --hidden-dim 32 --encoder-ffn 32 "
    "--decoder-layers 1 --decoder-ffn 32 --num-points 32 --batch 6 --log-every 1 --save-every 2 "
    """--score-threshold 0.3 --device cpu --backbone-args '{"stem_type": "", "channels": [8, 8, 16, 16]}'"""
)


class Job:
    """`processes` of one run, as torchrun would start them. fault: name of a function below, which is called
    with (rank, *arguments) in each of them first."""

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
        """The exit codes; those of processes that were killed are negative. AssertionError after so long."""
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
        return "".join(log.read_text() for i, log in enumerate(self.logs) if rank in (None, i))

    def wait_for(self, words, rank=0, seconds=60):
        """Until a process has printed something; whether it has."""
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
    multiprocessing.set_start_method("fork", force=True)  # of loaders, as usual
    code = 0
    try:
        if fault:
            globals()[fault[0]](rank, *fault[1:])
        {"distill": distill.cli, "evaluate": evaluate.main}[script](arguments)
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    atexit._run_exitfuncs()  # multiprocessing's end leaves them out
    os._exit(code)


# ------------------------------------------------------------------------------------------------ faults


def at_step(rank, who, phase, step, action):
    """Before the optimiser's step `step` (from 0) of a phase, process `who` does what `action` says."""
    update = engine.Run.update

    def faulty(run, *arguments):
        if (rank, run.phase, run.step) == (who, phase, step):
            print("fault:", action, flush=True)
            if action == "raise":
                raise KeyError("planted")
            os.kill(os.getpid(), getattr(signal, action))
        return update(run, *arguments)

    engine.Run.update = faulty


def not_finite(rank, who, phase, steps):
    """In these steps the images of one process are NaN."""
    run_update, make = engine.Run.__iter__, burnin.stack_images
    now = {}

    def iterate(run):
        for step in run_update(run):
            now["step"] = run.phase, step
            yield step

    def faulty(batch, key, device):
        bad = rank == who and now["step"] in [(phase, step) for step in steps]
        return make(batch, key, device) * float("nan") if bad else make(batch, key, device)

    engine.Run.__iter__, burnin.stack_images = iterate, faulty


def loader(rank, who, kind):
    """A process that loads data for `who` dies or gets stuck after some images."""
    get, count = data.Views.__getitem__, []

    def faulty(views, key):
        count.append(key)
        if rank == who and torch.utils.data.get_worker_info() and len(count) > 10:
            print("fault: loader", kind, flush=True)
            os.kill(os.getpid(), signal.SIGKILL) if kind == "dead" else time.sleep(1000)
        return get(views, key)

    data.Views.__getitem__ = faulty


def slow_evaluation(rank, seconds, who=None):
    """Of all processes, or of one."""
    predict = evaluate.predict
    if who not in (None, rank):
        return

    def slow(*arguments):
        print("evaluating", flush=True)
        time.sleep(seconds)
        return predict(*arguments)

    evaluate.predict = slow


def slow_step(rank, phase, step):
    """Of many long operations."""
    update = engine.Run.update

    def slow(run, *arguments):
        if (run.phase, run.step) == (phase, step):
            print("a slow step", flush=True)
            for _ in range(50):
                sum(range(10**7))
        return update(run, *arguments)

    engine.Run.update = slow


def streams_from_the_start(rank):
    stream = setting.stream
    setting.stream = lambda *arguments, first_step, **more: stream(*arguments, **more)


def no_space(rank, phase, step):
    """From a step on no file may grow beyond 100 kB."""
    save = engine.Run.save

    def faulty(run, path, at, **results):
        if (run.phase, at) == (phase, step):
            print("fault: no space", flush=True)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return save(run, path, at, **results)

    engine.Run.save = faulty


def stale(rank, what):
    """Process 1 does not see what the other one has written into the folder they share."""
    print("fault: stale", what, flush=True)
    if rank == 1:
        module, answer = {"newest": (engine, (None, None)), "finished": (setting, False)}[what]
        setattr(module, what, lambda *_, **__: answer)


def nobody(rank):
    """Root may write everywhere."""
    lock = setting.lock

    def by_nobody(folder):
        if os.getuid() == 0:
            os.seteuid(65534)
        print("fault: user", os.geteuid(), flush=True)
        lock(folder)

    setting.lock = by_nobody


def noisy_truth(rank):
    """In place of a model's predictions: the objects, moved, some with wrong classes and some left out, the
    same for an image wherever it is seen."""
    make = evaluate.coco_results

    def detections(image_id, result, category_ids):
        found, rng = make(image_id, result, category_ids), np.random.default_rng(image_id)
        print("image", image_id, flush=True)
        for o in truth[0].objects(image_id):
            mask = mask_tools.decode(data.to_rle(o["segmentation"], *truth[0].size(image_id)))
            rle = mask_tools.encode(np.asfortranarray(np.roll(mask, rng.integers(0, 5), axis=0)))
            category = rng.choice(category_ids) if rng.random() < 0.2 else o["category_id"]
            entry = {"image_id": image_id, "category_id": int(category), "segmentation": rle}
            found.append(entry | {"score": float(rng.random())})
        return found

    truth, evaluate.coco_results = [], detections
    read = evaluate.CocoDataset

    def remember(*arguments):
        truth.append(read(*arguments))
        return truth[0]

    evaluate.CocoDataset = remember
    mask_ap = evaluate.mask_ap

    def keep(dataset, detections):
        order = sorted(detections, key=lambda d: (d["image_id"], d["score"]))
        digest = hashlib.sha256(repr([(d["score"], d["segmentation"]) for d in order]).encode())
        print("detections", len(order), digest.hexdigest(), flush=True)
        return mask_ap(dataset, detections)

    evaluate.mask_ap = keep


def few_objects(rank):
    """The second process has images without objects, and a teacher that finds nothing."""
    if rank == 1:
        burnin.to_device = lambda batch, device: [
            {"labels": item["labels"][:0], "masks": item["masks"][:0]} for item in batch
        ]
        pseudo_labels = burnin.pseudo_labels
        burnin.pseudo_labels = lambda outputs, **_: pseudo_labels(outputs, 2.0)
        print("fault: no objects", flush=True)
