"""bench/ablation.py: its recipes are commands that run, and its tables are what they found."""

import importlib
import json
import re
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import ROOT, run
from faults import TINY

import burnin
import checkpoints
import distill
from shapes import write_shapes


def bench(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module(name)


@pytest.fixture
def tables(monkeypatch):
    return bench("ablation_tables", monkeypatch)


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """The script as a module, on a tiny data set; its commands run in this process."""
    module = bench("ablation", monkeypatch)
    write_shapes(tmp_path / "tiny", num_train=12, num_val=4, size=64)
    flags = f"--data {tmp_path / 'tiny'} " + " ".join(f"'{flag}'" for flag in TINY)
    monkeypatch.setattr(module.recipes, "DATA", {"shapes": (flags, (1, 2, 1))})
    module.commands = []

    def call(_, words, stdout, **__):
        module.commands.append(Path(words[1]).name)
        stdout.write(run(*words[1:]).stdout)

    module.real_call = module.Ablation.call
    monkeypatch.setattr(module.Ablation, "call", call)
    return module


def test_a_recipe_runs_once_and_the_papers_before_what_starts_from_it(ablation, tmp_path):
    results = tmp_path / "results.jsonl"
    for _ in range(2):
        runs = ablation.Ablation(tmp_path / "runs", results)
        for recipe in ("refined", "paper", "unguided", "no-distillation"):
            runs.run("shapes", 0.5, 3, recipe)
    scripts = ["distill.py", "distill.py", "burnin.py", "distill.py", "burnin.py"]
    assert ablation.commands == scripts, "the paper's, refined, unguided, no distillation; nothing twice"
    records = {record["recipe"]: record for record in ablation.read(results)}
    assert list(records) == ["paper", "refined", "unguided", "no-distillation"]
    phases = {name: [point["phase"] for point in record["curve"]] for name, record in records.items()}
    assert phases["paper"] == ["teacher", "burnin", "distill"]
    assert phases["unguided"] == ["burnin", "distill"]
    assert phases["refined"] == ["labels_only"] and phases["no-distillation"] == ["burnin"]
    assert [point["step"] for point in records["no-distillation"]["curve"]] == [2]
    last = checkpoints.load_checkpoint(tmp_path / "runs/shapes-0.5-3/paper/distill.pt")
    expected = last["ap"]["AP"], last["teacher_ap"]["AP"]
    found = ablation.results_of(records["paper"])
    assert (found["paper"], found["paper, EMA teacher"]) == pytest.approx(expected, abs=0.01)
    student = records["unguided"]["curve"][0]
    assert {"student_precision", "student_recall", "precision"} <= student.keys()
    start = checkpoints.load_checkpoint(tmp_path / "runs/shapes-0.5-3/unguided-start/burnin.pt")
    assert start["config"]["unsupervised_weight"] == 0


def test_a_recipe_waits_for_those_that_it_starts_from(ablation, tmp_path, monkeypatch):
    runs, started, ended = ablation.Ablation(tmp_path, tmp_path / "results.jsonl"), [], []

    def execute(_, data, ratio, seed, recipe, own):
        started.append(recipe)
        time.sleep(0.05)
        own.mkdir(parents=True)
        for name in ("teacher", "burnin", "distill", "labels_only"):
            (own / f"{name}.pt").touch()
        runs.recorded.add((data, ratio, seed, recipe))
        ended.append(recipe)

    monkeypatch.setattr(ablation.Ablation, "execute", execute)
    after = {
        "clean-refined": "clean",
        "clean": "paper",
        "refined": "paper",
        "labels-only-refined": "labels-only",
    }
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(runs.run, "shapes", 0.5, 3, recipe) for recipe in [*after, *after.values()]]
    assert not any(job.exception() for job in jobs)
    assert sorted(started) == sorted({*after, *after.values()}), "each once"
    for recipe, first in after.items():
        assert ended.index(first) < ended.index(recipe)


def test_a_record_that_was_cut_short_is_none_and_spoils_no_other(ablation, tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text('{"data": "shapes", "ratio": 0.5, "seed": 3, "recipe": "paper"}\n{"data": ')
    ablation.Ablation(tmp_path / "runs", results).run("shapes", 0.5, 3, "labels-only")
    assert [record["recipe"] for record in ablation.read(results)] == ["paper", "labels-only"]


@pytest.mark.parametrize("recipe, phase", [("labels-only", "labels_only"), ("paper", "teacher")])
def test_a_phase_whose_end_was_not_logged_is_refused(ablation, tmp_path, recipe, phase):
    def run_it():
        ablation.Ablation(tmp_path / "runs", tmp_path / "results.jsonl").run("shapes", 0.5, 3, recipe)

    run_it()
    metrics = tmp_path / f"runs/shapes-0.5-3/{recipe}/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        if line.get("phase") == phase and "ap" in line:
            line["step"] -= 1  # as of an earlier evaluation
    metrics.write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "results.jsonl").unlink()
    with pytest.raises(RuntimeError, match=f"lacks the end of phase {phase}"):
        run_it()


def test_the_script_runs_a_recipe_as_a_command_and_writes_the_page(ablation, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablation.Ablation, "call", ablation.real_call)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.jsonl")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        flags = ["--recipes", "labels-only", "--seeds", "3", "--ratio", "0.5"]
        record = ["--runs", str(tmp_path / "a run"), "--results", str(ablation.RESULTS)]
        for arguments in ([*flags, *record], ["--tables"]):
            monkeypatch.setattr(sys, "argv", ["ablation.py", *arguments])
            ablation.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert "labels_only done" in (tmp_path / "a run/shapes-0.5-3/labels-only/log").read_text()
    assert "50 % of the labels" in capsys.readouterr().out
    assert (
        "| `labels-only` | labels only, for the steps of all phases | "
        in (tmp_path / "ABLATION.md").read_text()
    )


def test_the_quick_table_is_made_of_runs_of_its_own(ablation, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation.Ablation, "call", ablation.real_call)
    monkeypatch.setattr(ablation, "QUICK", (1, 1, 1))
    monkeypatch.setattr(ablation, "MAIN", ["labels-only", "threshold-0.9"])  # of which one is left out
    monkeypatch.setattr(ablation.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--quick", "--ratio", "0.5", "--jobs", "1"])
    ablation.main()
    printed = capsys.readouterr()
    assert "threshold-0.9 is left out" in printed.err and "(2) |" in printed.out
    runs = ablation.read(tmp_path / "runs/ablation-quick/results.jsonl")
    assert [(run["seed"], run["steps"], run["curve"][-1]["step"]) for run in runs] == [
        (0, [1, 1, 1], 3),
        (1, [1, 1, 1], 3),
    ]


def test_a_command_that_fails_is_an_error_and_after_a_stop_nothing_begins(ablation, tmp_path, monkeypatch):
    monkeypatch.undo()
    runs = ablation.Ablation(tmp_path, tmp_path / "results.jsonl")
    with pytest.raises(RuntimeError, match="-c 'exit.7.' ended with 7, see its log"):
        runs.call([sys.executable, "-c", "exit(7)"])
    threading.Timer(0.3, runs.stop).start()
    with pytest.raises(RuntimeError, match="ended with -15"):
        runs.call([sys.executable, "-c", "import signal; signal.pause()"])
    with pytest.raises(RuntimeError, match="stopped"):
        runs.call([sys.executable, "-c", ""])


@pytest.mark.parametrize("data", ["shapes", "nuclei"])
def test_every_recipe_is_a_command_with_the_flags_of_its_data(data, monkeypatch):
    recipes = bench("recipes", monkeypatch)
    for recipe, (_, texts) in recipes.RECIPES.items():
        for text in texts:
            line = recipes.command(text, data, 0.05, 7, (10, 20, 30), Path("runs/x") / recipe)
            script, *flags = shlex.split(line)
            program = {"distill.py": distill, "burnin.py": burnin}[script]
            cfg = burnin.parse(program.Config, program.PRESETS, flags)
            everything = recipe == "all-labels"
            assert (cfg.seed, cfg.ratio) == (7, 1.0 if everything else 0.05), line
            assert bool(cfg.split) == (data == "nuclei" and not everything)
            steps = {"refined": (3,) * 3, "no-distillation": (10, 49, 1), "two-phase": (10, 1, 49)}
            steps |= {"clean-refined": (3,) * 3, "labels-only-refined": (3,) * 3, "restarted": (10, 1, 9)}
            steps |= {"shorter": (10, 10, 40), "longer": (10, 35, 15), "more-distillation": (10, 20, 39)}
            assert cfg.steps == steps.get(recipe, (10, 20, 30)), line


def test_tables_have_means_deviations_and_paired_differences(tables):
    def curve(*aps):
        return [{"phase": "labels_only", "step": 9, "ap": ap} for ap in aps]

    shared = {"data": "shapes", "ratio": 0.1, "recipe": "labels-only"}
    runs = [shared | {"seed": seed, "curve": curve(1.0, ap)} for seed, ap in ((0, 10.0), (1, 12.0))]
    for seed, ap in ((0, 13.0), (1, 14.0), (2, 99.0)):
        ends = {"teacher": 5.0, "burnin": ap - 1, "distill": ap}
        points = [{"phase": phase, "step": 9, "ap": value} for phase, value in ends.items()]
        points[-1]["teacher_ap"] = ap + 1
        runs.append(shared | {"seed": seed, "recipe": "paper", "curve": points})
    rows = tables.gather(runs)["shapes", 0.1]
    assert rows["labels-only"] == {0: 10.0, 1: 12.0} and rows["burnt-in"][1] == 13.0
    lines = tables.table(rows)
    ours = next(line for line in lines if "**Guided Distillation**" in line).split("|")
    # Differences of 3 and 2 over the two seeds that both have; standard error sqrt(0.5 / 2).
    assert ours[4].strip() == "+2.5 ± 0.5 (2)" and ours[3].strip() == "42.0 ± 49.4 (3)"
    assert next(line for line in lines if "EMA teacher" in line).split("|")[5].strip() == "+1.0 ± 0.0 (3)"


def test_the_commands_that_the_readme_has_name_recipes_that_there_are(tables):
    text = (ROOT / "README.md").read_text()
    commands = [shlex.split(line) for line in re.findall("`(python bench/ablation.py [^`]*)`", text)]
    assert len(commands) == 4
    for words in commands:
        assert {w for w in words if w[:2] == "--"} <= {"--quick", "--data", "--ratio", "--recipes"}
        after = words[words.index("--recipes") + 1 :] if "--recipes" in words else []
        assert set(after) <= tables.RECIPES.keys() and ("--quick" in words or after)


def test_the_page_and_its_figure_are_made_of_the_records(tables, tmp_path):
    records = []
    for recipe in ("paper", "unguided", "labels-only"):
        phases = ["labels_only"] if recipe == "labels-only" else ["burnin", "distill"]
        points = [{"phase": p, "step": 5, "ap": 10.0, "teacher_ap": 11.0, "precision": 1.0} for p in phases]
        health = {"recall": 2.0, "mask_iou": 3.0, "student_precision": 4.0}
        points = [p | health | {"student_recall": 1.0, "student_mask_iou": 1.0} for p in points]
        points = [points[0] | {"phase": "teacher", "step": 10}] * (recipe == "paper") + points
        record = {"data": "shapes", "ratio": 0.02, "seed": 0, "recipe": recipe, "curve": points}
        record |= {"commands": ["distill.py --steps 10,20,30"]}
        records.append(record | {"steps": [10, 20, 30], "hours": 1, "machine": "M", "date": "2026-01-01"})
    step = tables.values_of(records[0], "distill", "ap")
    assert step == {35: 10.0}, "counted from the beginning of phase 1"
    refined = records[0] | {"commands": ["distill.py --labels-only --steps 3"]}
    refined["curve"] = [{"phase": "labels_only", "step": 9, "ap": 10.0}]
    assert tables.values_of(refined, "labels_only", "ap") == {69: 10.0}, "or after the paper's end"
    again = records[0] | {"commands": ["distill.py --student a/paper/distill.pt --steps 10,1,6"]}
    assert tables.values_of(again, "distill", "ap") == {65: 10.0}, "behind the other run's end"
    both = refined | {"recipe": "clean-refined", "commands": records[0]["commands"] + refined["commands"]}
    both["curve"] = records[0]["curve"] + refined["curve"]
    assert tables.values_of(both, "distill", "ap") == {35: 10.0}
    assert tables.values_of(both, "labels_only", "ap") == {69: 10.0}
    assert tables.results_of(both | {"curve": [*both["curve"][:-1], refined["curve"][0] | {"ap": 12.0}]}) == {
        "clean-refined": 12.0
    }
    records[-1]["machine"] = "N"
    tables.write_page(json.loads(json.dumps(records)), tmp_path)
    page = (tmp_path / "ABLATION.md").read_text()
    last = f"Machine: M; N, of which 1 run is, of `{records[-1]['recipe']}`."
    paid = "3 runs, 3.0 hours of training without evaluations, 2026-01-01. "
    assert paid + last in page and "| unguided burn-in" in page
    commands, _, waiting = page.partition("not run yet: ")
    assert "| `unguided` | " in commands and "`clean`" in waiting and "`clean` |" not in commands
    assert (tmp_path / "ablation-shapes-2.png").stat().st_size > 10_000
    assert (tmp_path / "ablation-shapes-2-curves.png").stat().st_size > 5_000
