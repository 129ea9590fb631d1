"""Every command and every example of the README and of docs/RUNNING.md, as a user gives them, but shorter and
on a tiny data set. Those that need real data or GPUs say so, and their flags are read."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import ROOT, run

import burnin
import distill
import evaluate

README = "".join((ROOT / name).read_text() for name in ("README.md", "docs/RUNNING.md"))
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
COMMANDS = [
    line
    for language, block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(srun |torchrun |python |make |pip )", line)
]
SHORTER = (
    "--steps 2 --batch 2 --crop 64,64 --hidden-dim 32 --encoder-ffn 32 --decoder-layers 1 --decoder-ffn 32"
)
SHORTER = f"{SHORTER} --num-points 32 --workers 0 --device cpu --log-every 1"
SMALL_MODEL = " --preset shapes"  # for a folder of one's own, which would take that of COCO


def parts(command):
    """Script and flags, without the launcher and the comment."""
    words = shlex.split(command.split("#")[0].replace("$head", "head"))
    start = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return words[start], words[start + 1 :]


@pytest.fixture(scope="module")
def place(shapes, tmp_path_factory):
    """A folder that has what the commands name: generated shapes, a data set, folders of images."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("datasets/shapes", "my_dataset"):
        shutil.copytree(shapes, folder / name)
    for name in ("my_images", "photos"):
        shutil.copytree(shapes / "images", folder / name)
    return folder


def test_the_readme_has_commands_of_every_script_and_target():
    assert len(COMMANDS) > 20 and len(set(COMMANDS)) == len(COMMANDS)
    scripts = {parts(c)[0] for c in COMMANDS if ".py" in c}
    assert scripts == {"distill.py", "burnin.py", "evaluate.py", "data.py"}
    makefile = (ROOT / "Makefile").read_text()
    for target in (c.split()[1] for c in COMMANDS if c.startswith("make ")):
        assert f"\n{target}:" in makefile
    assert "distill.py --data shapes --ratio 0.02\n" in makefile
    for file in (
        word for c in COMMANDS if c.startswith("pip ") for word in c.split() if word.endswith(".txt")
    ):
        assert (ROOT / file).exists()


def test_every_command_runs(place):
    """In the order of the README: later ones take what earlier ones leave."""
    needs = [
        c for c in COMMANDS if "# needs " in c or c.startswith("srun") or "--data coco" in c.split("#")[0]
    ]
    ran = 0
    for command in COMMANDS:
        if command in needs or ".py" not in command:
            continue
        script, flags = parts(command)
        if "--help" in flags:
            assert "--score-threshold" in run(script, *flags, cwd=place).stdout
        elif script in ("distill.py", "burnin.py"):
            own = "my_dataset" in command
            done = run(script, *flags, *(SHORTER + SMALL_MODEL * own).split(), cwd=place)
            assert "done" in done.stdout, command
        else:
            run(script, *flags, cwd=place)
        ran += 1
    assert ran >= 12
    assert all((place / name).exists() for name in ("predictions/results.json", "found/results.json"))
    assert (place / "to_correct/instances_train.json").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if ".py" in c])
def test_the_flags_of_every_command_are_known(command):
    script, flags = parts(command)
    if script == "distill.py" and "--help" not in flags:
        burnin.parse(distill.Config, distill.PRESETS, flags)
    elif script == "burnin.py":
        burnin.parse(burnin.Config, burnin.PRESETS, flags)
    elif script == "evaluate.py":
        evaluate.arguments(flags)


def test_every_example_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    examples = [block for language, block in BLOCKS if language == "python"]
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "example"})


def test_files_and_flags_that_the_readme_names_exist():
    for name in re.findall(r"`(\w+/?\w*\.(?:py|md|txt|cff))`", README):
        assert (ROOT / name).exists() or (ROOT / "bench" / name).exists(), name
    known = {"--" + name.replace("_", "-") for name in distill.Config.__dataclass_fields__}
    files = Path(evaluate.__file__), ROOT / "tools/check.py", ROOT / "bench/ablation.py"
    others = "".join(file.read_text() for file in files)
    for flag in set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", README)):
        assert flag in known or f'"{flag}"' in others or flag in TORCHRUN | ARGPARSE, flag


TORCHRUN = {"--nproc_per_node", "--nproc", "--nnodes", "--max-restarts"}
ARGPARSE = {"--help"}
