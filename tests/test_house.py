"""The house: which file may import which, what an import costs, who may touch the model."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent
PACKAGE = HERE / "hookkit"

# Each file may import only from files above it.
ORDER = [
    "displaying",
    "errors",
    "arguments",
    "whole_files",
    "checked_files",
    "sites",
    "positions",
    "families.places",
    "families.parts",
    "families.reasons",
    "families.llama_like",
    "families.other_layouts",
    "families.table",
    "families",
    "ranking",
    "layout",
    "sharding",
    "wrapped",
    "placement",
    "calls",
    "scopes",
    "lent",
    "forms",
    "inside",
    "finding.watching",
    "finding.matching",
    "finding.attending",
    "finding.stream",
    "finding.neurons",
    "finding.blocks",
    "finding.whole",
    "finding.looking_up",
    "finding",
    "vocabulary",
    "describing",
    "selecting",
    "model",
    "rows",
    "spreading",
    "zoo",
    "stored",
    "tiny_models",
    "training",
    "padding",
    "prompts",
    "captured",
    "deciding",
    "hooks.codec",
    "hooks.base",
    "hooks.rounding",
    "hooks.fitting",
    "hooks.looking",
    "hooks.edits",
    "hooks.stand_ins",
    "hooks.replacing",
    "hooks.cutting",
    "hooks.conditions",
    "hooks.phrases",
    "hooks.logits",
    "hooks.choosing",
    "hooks.moving",
    "hooks",
    "generation",
    "taps",
    "overflow",
    "firing",
    "keeping",
    "acting",
    "caches",
    "following",
    "tracing",
    "manager.precedence",
    "manager.again",
    "manager.stance",
    "manager.running",
    "manager.forwards",
    "manager.block",
    "manager",
    "about",
    "runs.run",
    "runs.asking",
    "runs.draws",
    "runs.forwarding",
    "runs.generating",
    "runs",
    "attention_views",
    "engines.steps",
    "engines.travelling",
    "engines.cluster",
    "engines.crew",
    "engines",
    "laws.study",
    "laws.law",
    "laws.looking",
    "laws.editing",
    "laws.reading",
    "laws.proving",
    "laws",
    "checkups",
    "distributions",
    "metrics.metric",
    "metrics.answers",
    "metrics.tokens",
    "metrics.wholes",
    "metrics.continuing",
    "metrics.given",
    "metrics",
    "intervals",
    "sweeps.prefix",
    "sweeps.reading",
    "sweeps.cells",
    "sweeps.reach",
    "sweeps.narrowing",
    "sweeps.wave",
    "sweeps.passes",
    "sweeps.saying",
    "sweeps.trial",
    "sweeps.grouping",
    "sweeps.planning",
    "sweeps.journal",
    "sweeps.sources",
    "sweeps.working",
    "sweeps.running",
    "sweeps.controls",
    "sweeps.targets",
    "sweeps.verifying",
    "sweeps.sweep",
    "sweeps.grids",
    "sweeps.noising",
    "sweeps.paths",
    "sweeps.summaries",
    "sweeps",
    "differentiating.backward",
    "differentiating.found",
    "differentiating.between",
    "differentiating.softmaxed",
    "differentiating.attribution",
    "differentiating.agreement",
    "differentiating.tokens",
    "differentiating.stream",
    "differentiating.edges",
    "differentiating",
    "scenarios",
    "tables",
    "lenses.tail",
    "lenses.numbers",
    "lenses.lens",
    "lenses.patchscope",
    "decomposing.frozen",
    "decomposing.components",
    "decomposing.direct",
    "decomposing.path",
    "decomposing",
    "surprisals",
    "scoring",
    "warping",
    "judging",
    "choices",
    "taking_turns",
    "streaming",
    "comparing",
    "datasets.pairs",
    "datasets.drawing",
    "datasets.indirect",
    "datasets.years",
    "datasets.series",
    "datasets.repeats",
    "datasets.facts",
    "datasets",
    "figures",
    "heatmaps",
    "origins",
    "curves",
    "strips",
    "passages",
    "steps",
    "typesetting",
    "reports",
    "files",
    "against",
    "recording",
    "gallery",
    "lenses.tuned",
    "lenses",
    "harvesting.texts",
    "harvesting.windows",
    "harvesting.values",
    "harvesting.computing",
    "harvesting.progress",
    "harvesting.folder",
    "harvesting.columns",
    "harvesting.moments",
    "harvesting.strongest",
    "harvesting.summary",
    "harvesting.reading",
    "harvesting.writing",
    "harvesting.collecting",
    "harvesting",
    "vectors.origin",
    "vectors.vector",
    "vectors.streams",
    "vectors.differences",
    "vectors.aiming",
    "vectors.fitting",
    "vectors.damage",
    "vectors.doses",
    "vectors.comparing",
    "vectors.drawing",
    "vectors",
    "spelling.words",
    "spelling.reading",
    "spelling.writing",
    "spelling",
    "shifts.naming",
    "shifts.resuming",
    "shifts.measuring",
    "shifts.inside",
    "shifts.texts",
    "shifts.drawing",
    "shifts.sections",
    "shifts.page",
    "shifts",
    "docs.first_steps",
    "docs.places",
    "docs.logits",
    "docs.causes",
    "docs.coming_from",
    "docs.symptoms",
    "docs",
    "diffing.pairing",
    "diffing.cka",
    "diffing.alike",
    "diffing.saying",
    "diffing.reading",
    "diffing.drawing",
    "diffing.page",
    "diffing.difference",
    "diffing.running",
    "diffing",
    "cli.gathering",
    "cli.base",
    "cli.printing",
    "cli.options",
    "cli.engine",
    "cli.reading",
    "cli.asking",
    "cli.scanning",
    "cli.shifting",
    "cli.generating",
    "cli.tracing",
    "cli.sweeping",
    "cli.starting",
    "cli.results",
    "cli.differing",
    "cli.harvesting",
    "cli.examining",
    "cli.storing",
    "cli",
]

FILES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
}


def imported(path: Path) -> set[str]:
    """The files of hookkit that a file imports, wherever in it."""
    package = path.relative_to(HERE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {".".join([*base, name]) for name in names}
    return {name.removeprefix("hookkit.") for name in found}


def modules(path: Path) -> set[str]:
    """The packages that a file imports when it is imported itself."""
    nodes = ast.parse(path.read_text()).body
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in found}


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_every_file_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(FILES)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_above_it(name):
    above = ORDER[: ORDER.index(name)]
    assert imported(FILES[name]) <= {*above}


def test_the_import_is_light():
    loaded = set(fresh("import sys; import hookkit; print(*sys.modules)").split())
    assert not loaded & {"torch", "transformers", "pandas", "numpy", "matplotlib", "jinja2", "rich", "typer", "ray"}


def test_every_name_of_the_catalogue_is_there():
    assert (
        fresh("import hookkit as hk; [getattr(hk, name) for name in hk.__all__]; print(len(hk.__all__) > 40)") == "True"
    )
    assert "force" in fresh("import hookkit as hk; print(dir(hk))")


MODULES = {"datasets", "errors", "figures"}  # names of the catalogue that are modules


def test_no_module_bears_the_name_of_something_in_the_catalogue():
    code = """
import importlib, pkgutil, types
import hookkit as hk

for found in pkgutil.iter_modules(hk.__path__):
    if found.name != "cli":
        importlib.import_module(f"hookkit.{found.name}")
print(*(name for name in hk.__all__ if isinstance(getattr(hk, name), types.ModuleType)))
"""
    assert set(fresh(code).split()) == MODULES
    lines = (PACKAGE / "__init__.pyi").read_text().splitlines()
    names = {line.split()[-1] for line in lines if line.startswith("from")}
    assert names & {name.partition(".")[0] for name in FILES} == MODULES


def test_the_catalogue_is_sorted_and_re_exports():
    lines = [line for line in (PACKAGE / "__init__.pyi").read_text().splitlines() if line.startswith("from")]
    assert lines == sorted(lines, key=lambda line: (line.split()[1] != ".", line.split()[1]))
    assert all(re.fullmatch(r"from \S+ import (\w+) as \1", line) for line in lines)


def test_only_the_manager_registers_hooks():
    assert [name for name, path in FILES.items() if "register_forward" in path.read_text()] == ["manager.block"]


@pytest.mark.parametrize(
    "name",
    [
        *ORDER[: ORDER.index("families") + 1],
        "figures",
        "heatmaps",
        "curves",
        "strips",
        "passages",
        "steps",
        "typesetting",
        "selecting",
        "shifts.drawing",
        "diffing.drawing",
    ],
)
def test_words_and_figures_need_no_torch(name):
    assert not modules(FILES[name]) & {"torch", "transformers"}


def test_no_experiment_imports_another():
    for path in (HERE / "experiments").rglob("*.py"):
        assert "experiments" not in modules(path), path


def test_nothing_that_is_kept_names_a_place_on_a_machine():
    kept = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, text=True, check=False)
    if kept.returncode:
        pytest.skip("not a git checkout")
    place = re.compile(rb"/(home|root|work|Users|tmp)/\w|https?://(localhost|127\.|10\.|192\.168)")
    found = [name for name in kept.stdout.split("\0") if name and place.search((HERE / name).read_bytes())]
    assert [name for name in found if name != "tests/test_house.py"] == []
