"""The layout of the repository: which file may import which, and which files stand alone."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
METHOD = ("model.py", "matcher.py", "data.py", "burnin.py", "distill.py", "evaluate.py")
KERNELS = ("deform_attn_cpu.py", "deform_attn_triton.py")
ANYTHING = None

# What each file or package may import of this repository. A package may always import its own files.
MAY_IMPORT = {
    "model": {"deform_attn_cpu", "deform_attn_triton"},
    "deform_attn_cpu": set(),
    "deform_attn_triton": set(),
    "matcher": set(),
    "data": set(),
    "burnin": {"model", "matcher", "data", "evaluate", "training"},
    "distill": {"burnin", "model", "matcher", "data", "evaluate", "training", "tools.report"},
    "evaluate": {"model", "data", "training", "layouts", "interop"},
    "training": {"model", "matcher", "data", "layouts", "interop"},
    "layouts": {"data"},
    "interop": {"model"},
    "tools": ANYTHING,
    "benchmarks": ANYTHING,
    "experiments": ANYTHING,
    "tests": ANYTHING,
}
# Files of these folders run as scripts: the folder is on the path, so a file there hides one of the root.
SCRIPT_FOLDERS = ("benchmarks", "experiments", "tests")


def python_files() -> list[Path]:
    hidden = (".", "runs", "datasets")
    files = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    return sorted(path for path in files if not path.parts[0].startswith(hidden))


MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in python_files()}


def imported(node: ast.AST) -> list[str]:
    """Return the modules of this repository that an import statement names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    else:
        return []
    return [name for name in names if name in MODULES]


def edges(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    found = {name for node in ast.walk(tree) for name in imported(node)}
    if path.parts[0] in SCRIPT_FOLDERS:
        found -= {Path(file).stem for file in (ROOT / path.parts[0]).glob("*.py")}
    return found


def test_the_root_holds_the_method_and_its_kernels_only():
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(METHOD + KERNELS)


@pytest.mark.parametrize("path", python_files(), ids=str)
def test_a_file_imports_only_what_the_layout_allows(path):
    owner = path.with_suffix("").parts[0]
    assert owner in MAY_IMPORT, f"{path} is in no folder of the layout"
    allowed = MAY_IMPORT[owner]
    if allowed is not ANYTHING:
        own = {owner} if len(path.parts) > 1 else set()
        for name in edges(path):
            assert name in allowed or name.split(".")[0] in allowed | own, f"{path} imports {name}"


def test_only_the_end_of_distill_imports_the_tools():
    importers = {str(path) for path in python_files() for name in edges(path) if name.startswith("tools.")}
    allowed = {"distill.py"} | {f for f in importers if f.startswith(("tools/", "tests/", "benchmarks/"))}
    assert importers <= allowed and "distill.py" in importers


def test_there_is_no_import_circle():
    graph = {
        name: edges(path) - {name} for name, path in MODULES.items() if path.parts[0] not in SCRIPT_FOLDERS
    }
    done, active = set(), []

    def visit(name):
        assert name not in active, f"import circle: {' -> '.join([*active[active.index(name) :], name])}"
        if name not in done:
            active.append(name)
            for other in graph.get(name, ()):
                visit(other)
            active.pop()
            done.add(name)

    for name in graph:
        visit(name)
    assert done >= {"distill", "training.setup", "tools.report"}


def test_the_circle_test_finds_a_circle(monkeypatch):
    monkeypatch.setattr(
        f"{__name__}.edges",
        lambda path: {"burnin": {"evaluate"}, "evaluate": {"burnin"}}.get(path.stem, set()),
    )
    with pytest.raises(AssertionError, match="import circle: (burnin|evaluate) -> "):
        test_there_is_no_import_circle()


@pytest.mark.parametrize("path", [p for p in python_files() if p.parts[0] not in SCRIPT_FOLDERS], ids=str)
def test_no_import_of_this_repository_hides_in_a_function(path):
    tree = ast.parse((ROOT / path).read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
    hidden = [name for function in functions for node in ast.walk(function) for name in imported(node)]
    assert not hidden, f"{path} imports {hidden} inside a function"


@pytest.mark.parametrize("path", [p for p in python_files() if p.parts[0] != "tests"], ids=str)
def test_every_imported_name_exists(path):
    """No test runs the benchmarks, so a renamed function would go unnoticed there."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            folder = MODULES[node.module].parts[0]
            if folder not in SCRIPT_FOLDERS and folder != path.parts[0]:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or name in MODULES, f"{path}: no {name}"


def test_the_training_step_stands_in_the_scripts():
    """Whoever reads the two phase scripts sees the method: no trainer, no hook."""
    text = {name: (ROOT / name).read_text() for name in ("burnin.py", "distill.py")}
    for name, phases in {
        "burnin.py": ("train_supervised", "guided_burn_in"),
        "distill.py": ("distill",),
    }.items():
        tree = ast.parse(text[name])
        bodies = {f.name: ast.unparse(f) for f in tree.body if isinstance(f, ast.FunctionDef)}
        for phase in phases:
            for words in (
                "criterion(",
                "zero_grad(",
                "loss.backward()",
                "clip_and_step(",
                "set_lr(",
                "wrap_ddp(",
            ):
                assert words in bodies[phase], f"{phase} has no {words}"
            # The guard copies the statistics of batch norms, which must be those of the checkpoint.
            assert bodies[phase].index(".resume(") < bodies[phase].index("GuardedStep(")
    assert sum(len(t.splitlines()) for t in text.values()) <= 500
