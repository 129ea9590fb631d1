"""The README and the pages of docs/ are correct: commands and examples run, and what they name exists.

Commands run as a user gives them, but shortened and on a tiny dataset. Those that need real data, GPUs or
hours say so in a comment ("# needs ..."), and only their flags are parsed."""

import ast
import dataclasses
import json
import re
import shlex
import shutil

import pytest
import torch
from commands import ROOT, run

import evaluate
from layouts.shapes import write_shapes
from training.cli import DATA_ARGS, parse_config
from training.config import Config

PAGES = {"README.md": ROOT / "README.md"} | {f"docs/{p.name}": p for p in sorted(ROOT.glob("docs/*.md"))}
TEXTS = {name: path.read_text() for name, path in PAGES.items()}
SOURCES = {
    path: path.read_text()
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in ("training", "layouts", "interop", "tools")))
    for path in ROOT.glob(pattern)
}
BLOCKS = [
    (name, language, block)
    for name, text in TEXTS.items()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
]
COMMANDS = list(
    dict.fromkeys(
        line
        for _, _, block in BLOCKS
        for line in block.splitlines()
        if re.match(r"(srun |torchrun |python |make |pip )", line)
    )
)
PROGRAMS = {"distill.py", "burnin.py", "evaluate.py", "tools.check_data", "tools.predict", "tools.export"}
TINY_MODEL = json.dumps({"hidden_dim": 32, "encoder_ffn": 32, "decoder_layers": 1, "decoder_ffn": 32})
SHORTER = f"--steps 2 --batch 2 --crop 64,64 --model-args '{TINY_MODEL}' --num-points 32 --workers 0"
SHORTER = shlex.split(f"{SHORTER} --device cpu --log-every 1")

FOREIGN_FLAGS = {"--help", "--nproc_per_node", "--nnodes", "--max-restarts", "--rdzv_backend"}
FOREIGN_FLAGS |= {"--rdzv_endpoint"}
FORMER_FLAGS = {"--refine"}  # named in the paragraph about former spellings
USER_FOLDERS = {"images/", "annotations/", "train2017/", "val2017/", "leftImg8bit/", "gtFine/", "photos/"}


def program_of(command: str) -> tuple[str | None, list[str]]:
    """Return the program of a command, a script or a module, and its flags, without launcher and comment."""
    words = shlex.split(command.split(" #")[0].replace("$head", "head"))
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    start = next((number for number, word in enumerate(words) if word.endswith(".py")), None)
    return (None, words) if start is None else (words[start], words[start + 1 :])


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def slugs(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", without_code(text))]


def string_literals() -> list[str]:
    """Return all strings of the project, f-strings with a mark for each value."""
    texts = []
    for node in (node for source in SOURCES.values() for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            texts.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    return texts


@pytest.fixture(scope="module")
def place(shapes, tmp_path_factory):
    """Return a folder with everything that the commands name: generated shapes, a dataset, images."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("datasets/shapes", "my_dataset"):
        shutil.copytree(shapes, folder / name)
    write_shapes(folder / "others", num_train=6, num_val=1, size=64, seed=1)
    for name in ("my_images", "photos"):
        shutil.copytree(folder / "others/images", folder / name)
    return folder


# -------------------------------------------------------------------------------------- commands and examples


def test_there_are_commands_of_every_program_and_target():
    programs = {program_of(command)[0] for command in COMMANDS} - {None}
    assert programs >= PROGRAMS
    assert {program for program in programs - PROGRAMS if not (ROOT / program).exists()} == set()
    makefile = (ROOT / "Makefile").read_text()
    targets = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert targets == {"demo", "test", "test-faults", "test-gpu", "test-oldest", "lint"}
    assert all(f"\n{target}:" in makefile for target in targets)
    assert "distill.py --data shapes --ratio 0.02 --recipe robust\n" in makefile
    words = [word for c in COMMANDS if c.startswith("pip ") for word in c.split() if word.endswith(".txt")]
    assert words and all((ROOT / word).exists() for word in words)


def test_the_oldest_versions_that_are_required_are_those_that_are_tested():
    required = (ROOT / "requirements.txt").read_text().split()
    tested = (ROOT / "tests/requirements-oldest.txt").read_text().splitlines()
    assert required and {line.replace(">=", "==") for line in required} <= set(tested)


def test_every_command_runs(place):
    """In the order of the pages: later commands use the files of earlier ones."""
    ran = 0
    for command in COMMANDS:
        program, flags = program_of(command)
        if program is None or "# needs " in command:
            continue
        assert program in PROGRAMS, f"{command!r} is neither run nor marked with what it needs"
        if "--help" in flags:
            assert "--score-threshold" in run(program, *flags, cwd=place).stdout
        elif program in ("distill.py", "burnin.py"):
            shorter = [*SHORTER]
            own_data = "my_dataset" in command  # Preset auto would download a backbone.
            if own_data:
                shorter += ["--backbone", "resnet10t", "--pretrained", "false"]
                shorter += ["--backbone-args", '{"stem_type": "", "channels": [16, 16, 32, 32]}']
            shorter += ["--finetune-steps", "2"] if "--finetune-steps" in flags else []
            assert "done" in run(program, *flags, *shorter, cwd=place).stdout, command
        else:
            too_old = program == "tools.export" and torch.__version__ < (2, 9)
            overwrite = ["--overwrite"] if program == "tools.predict" else []  # pages use the same folder
            run(program, *flags, *overwrite, cwd=place, code=2 if too_old else 0)
        ran += 1
    assert ran >= 12
    for file in ("predictions/results.json", "found/results.json", "to_correct/instances_train.json"):
        assert (place / file).exists(), file
    for file in ("finetune.pt", "supervised.pt", "report.html"):
        assert (place / "runs/shapes-0.02" / file).exists(), file
    assert (place / "exported/model.pt2").exists() == (torch.__version__ >= (2, 9))


@pytest.mark.parametrize("command", [c for c in COMMANDS if program_of(c)[0] in PROGRAMS])
def test_the_flags_of_every_command_are_valid(command):
    program, flags = program_of(command)
    assert not FORMER_FLAGS & set(flags)
    if program in ("distill.py", "burnin.py") and "--help" not in flags:
        parse_config(flags)
    elif program == "evaluate.py":
        evaluate.parse_arguments(flags)


@pytest.mark.parametrize("page", [name for name in PAGES if "```python\n" in TEXTS[name]])
def test_every_python_example_runs(page, place, monkeypatch):
    """The examples of one page run one after another, like the cells of a notebook."""
    monkeypatch.chdir(place)
    namespace = {"__name__": "example"}
    for name, language, block in BLOCKS:
        needs_export = "exported/" in block and not (place / "exported/model.onnx").exists()
        if (name, language) == (page, "python") and not needs_export:  # a command writes this folder
            exec(compile(block, page, "exec"), namespace)


def test_there_are_python_examples():
    assert sum(language == "python" for _, language, _ in BLOCKS) >= 5


# ------------------------------------------------------------------------------------- what the pages name


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_exist(page):
    links = re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[page]))
    for link in links:
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (PAGES[page].parent / file).resolve() if file else PAGES[page]
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in slugs(target.read_text()), f"{page}: {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    code = inline_code(TEXTS[page])
    files = [
        word for text in code for word in text.split() if re.fullmatch(r"[\w./*-]+\.(py|md|txt|cff)", word)
    ]
    folders = [text for text in code if re.fullmatch(r"[\w/]+/", text) and text not in USER_FOLDERS]
    for name in files + folders:
        assert list(ROOT.glob(name.rstrip("/"))), f"{page}: {name}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    names = [field.name for field in dataclasses.fields(Config)] + [*DATA_ARGS, "no_follow_links"]
    flags = {"--" + name.replace("_", "-") for name in names}
    everything = "\n".join(SOURCES.values())
    flags |= set(re.findall(r'(?:add|add_argument)\(\s*"(--[\w-]+)"', everything))
    named = {flag for text in inline_code(TEXTS[page]) for flag in re.findall(r"(?<!\S)--[a-z][\w-]+", text)}
    assert named - flags <= FOREIGN_FLAGS | FORMER_FLAGS, page


@pytest.mark.parametrize("page", PAGES)
def test_functions_and_names_exist(page):
    """A name in backticks occurs in the code; where its file is named too, it is defined there."""
    everything = "\n".join(SOURCES.values())
    for name in inline_code(TEXTS[page]):
        is_file = (ROOT / name).exists() or re.search(r"\.(py|md|txt|cff|pt2?|json|onnx)$", name)
        if re.fullmatch(r"[A-Za-z_][\w.]*\w", name) and not is_file:
            last = name.split(".")[-1]
            assert re.search(rf"\b{last}\b", everything), f"{page}: {name}"
    code = "".join(block for name, _, block in BLOCKS if name == page)
    pairs = re.findall(r"([\w/]+\.py): (\w+(?:, \w+)*)", code)
    pairs += [(file, name) for name, file in re.findall(r"`(\w+)` of\s+`([\w/]+\.py)`", TEXTS[page])]
    for file, names in pairs:
        tree = ast.parse((ROOT / file).read_text())
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert set(names.split(", ")) <= defined, f"{page}: {file}: {names}"


def test_the_method_names_a_function_in_each_step():
    method = next(block for name, _, block in BLOCKS if name == "README.md" and "phase 1" in block)
    assert len(re.findall(r"\w+\.py: \w", method)) >= 10


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    texts = string_literals()
    rows = re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/TROUBLESHOOTING.md"], re.M)
    assert len(rows) > 15
    for message in rows:
        for fragment in filter(None, (part.strip() for part in re.split(r"\.\.\.|; ", message))):
            assert any(fragment in text for text in texts), f"no message has {fragment!r}"


# --------------------------------------------------------------------------------------------------- layout


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES)
def test_text_is_wrapped_at_100_columns(page):
    lines = without_code(TEXTS[page]).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith(("|", "!["))]
