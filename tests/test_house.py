"""The house: which file may import which, what an import costs, who may touch the model."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "hookkit"

FILES = {
    ".".join(path.relative_to(HERE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "hookkit"]


def modules(path: Path) -> set[str]:
    """The packages that a file imports when it is imported itself."""
    nodes = ast.parse(path.read_text()).body
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }
    return {name.split(".")[0] for name in found}


def fresh(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_each_room_imports_only_from_the_rooms_below_it():
    program = Path(sys.executable).with_name("lint-imports")
    ended = subprocess.run(
        [program, "--no-cache"], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


def test_the_import_is_light():
    loaded = set(fresh("import sys; import hookkit; print(*sys.modules)").split())
    assert not loaded & {
        "torch",
        "transformers",
        "pandas",
        "numpy",
        "matplotlib",
        "jinja2",
        "rich",
        "typer",
        "ray",
    }


def test_every_name_of_the_catalogue_is_there():
    assert (
        fresh(
            "import hookkit as hk; [getattr(hk, name) for name in hk.__all__]; print(len(hk.__all__) > 40)"
        )
        == "True"
    )
    assert "force" in fresh("import hookkit as hk; print(dir(hk))")


PUBLIC_MODULES = {
    "datasets",
    "errors",
    "figures",
    "metrics",
    "results",
    "stats",
    "types",
    "when",
}


def test_at_most_ninety_names_are_flat_and_the_others_are_completed_in_their_modules():
    code = """
import hookkit as hk
for name in {modules}:
    module = getattr(hk, name)
    assert all(getattr(module, entry) is not None for entry in dir(module)), name
    print(name, *(entry for entry in dir(module) if entry != "__all__"))
print("hk", *dir(hk))
"""
    names = {}
    for line in fresh(code.format(modules=sorted(PUBLIC_MODULES))).splitlines():
        module, *entries = line.split()
        names[module] = set(entries)
    assert len(names["hk"]) <= 123
    assert {"logit_diff", "prob", "MetricInput"} <= names["metrics"]
    assert {"heat_map", "rank_bump"} <= names["figures"]
    assert names["when"] == {
        "Condition",
        "contains",
        "cosine",
        "entropy_above",
        "entropy_below",
        "margin_above",
        "margin_below",
        "norm_above",
        "prob_of",
        "rank_of",
        "reads",
        "text_ends",
    }
    assert {"HookkitError", "BadPrompt"} <= names["errors"] and "Iterable" not in names["errors"]
    assert {"indirect_object", "Pairs"} <= names["datasets"] and "pairs" not in names["datasets"]
    for module in PUBLIC_MODULES - {"types", "errors"}:
        assert not names[module] & names["hk"], "a name has one place"


def test_help_shows_the_names_of_types_and_not_their_unions():
    code = """
import inspect
import hookkit as hk
modules = [hk, hk.metrics, hk.stats, hk.results, hk.when, hk.figures]
for module in modules:
    for name in dir(module):
        function = getattr(module, name)
        if inspect.isfunction(function):
            print(name, inspect.signature(function))
"""
    signatures = dict(line.split(" ", 1) for line in fresh(code).splitlines())
    assert "clean: 'Prompts'" in signatures["patching"]
    for name, signature in signatures.items():
        assert "collections.abc" not in signature and "hookkit." not in signature, name


def test_no_module_bears_the_name_of_a_public_function():
    code = """
import importlib, pkgutil, types
import hookkit as hk

for found in pkgutil.walk_packages(hk.__path__, "hookkit."):
    importlib.import_module(found.name)
print(*(name for name in hk.__all__ if isinstance(getattr(hk, name), types.ModuleType)))
"""
    assert set(fresh(code).split()) == PUBLIC_MODULES


def test_the_catalogue_is_sorted_and_re_exports():
    lines = [
        line
        for line in (PACKAGE / "__init__.pyi").read_text().splitlines()
        if line.startswith("from")
    ]
    assert lines == sorted(lines, key=lambda line: (line.split()[1] != ".", line.split()[1]))
    assert all(re.fullmatch(r"from \S+ import (\w+) as \1", line) for line in lines)


def test_only_the_manager_registers_hooks():
    assert [name for name, path in FILES.items() if "register_forward" in path.read_text()] == [
        "hookkit.runs.engines.vllm_hooks",  # in the process of an engine
        "hookkit.runs.manager",
    ]


def test_no_experiment_imports_another():
    for path in (HERE / "experiments").rglob("*.py"):
        assert "experiments" not in modules(path), path


def test_nothing_that_is_kept_names_a_place_on_a_machine():
    kept = subprocess.run(
        ["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=False
    )
    if kept.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(rb"/(home|root|work|Users|tmp)/\w|https?://(localhost|127\.|10\.|192\.168)")
    found = [
        name
        for name in kept.stdout.split("\0")
        if name and place.search((HERE / name).read_bytes())
    ]
    assert [name for name in found if name != "tests/test_house.py"] == []


def test_git_has_the_tables_and_figures_of_results_and_two_pages():
    listed = subprocess.run(
        ["git", "ls-files", "results"], cwd=HERE, capture_output=True, text=True, check=False
    )
    paths = [Path(line) for line in listed.stdout.splitlines()]
    if not paths:
        pytest.skip("this is no clone")
    pages = {"results/oat_milk/report.html", "results/one_shift_report/report.html"}
    assert {str(path) for path in paths if path.suffix == ".html"} == pages
    others = {path.name for path in paths if path.suffix not in (".html", ".csv", ".png")}
    assert others == {"README.md", "about.json", "plan.md"}
    for folder in {path.parent for path in paths}:
        assert folder / "README.md" in paths, folder


def test_the_repository_is_small():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=False
    )
    paths = [HERE / name for name in listed.stdout.split("\0") if name]
    if not paths:
        pytest.skip("this is no clone")
    sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    results = {path: sizes[path] for path in sizes if path.is_relative_to(HERE / "results")}
    assert sum(results.values()) < 2_400_000
    assert sum(sizes.values()) < 8 * 2**20
    for path in results:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.mode == "P" and round(picture.info["dpi"][0]) == 100, path


def test_every_protocol_can_be_checked_at_run_time():
    """The laws run with the types of all annotations checked, and such a check needs it."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            if "Protocol" in [ast.unparse(base).partition("[")[0] for base in node.bases]:
                assert "runtime_checkable" in map(ast.unparse, node.decorator_list), node.name
