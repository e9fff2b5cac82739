"""Rules of the design, checked in the source and the docs, without importing torch, transformers or Megatron."""

import argparse
import ast
import graphlib
import importlib.metadata
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import gpt_oss_vision
from gpt_oss_vision import cli
from gpt_oss_vision.recipes.catalog import find
from gpt_oss_vision.recipes.training.overrides import parse

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("bridge", "conversion", "recipes")
SOURCES = sorted([*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))])
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Rule:
    """The permitted imports of a package: our modules by prefix, and other packages (None: any direct dependency)."""

    ours: tuple[str, ...]
    others: frozenset[str] | None = None


RECIPE_FILES = ("pretrain", "align", "sft", "lora", "long_context")
TASKS = ("importing", "exporting", "assemble", "verify")
BELOW_FORMATS = (
    *(f"conversion.{name}" for name in ("engine", "parameters", "messages", "dtypes")),
    *("errors", "terminal", "atomic"),
)
BELOW_TASKS = (*BELOW_FORMATS, "conversion.formats", "conversion.comparison", "conversion.lora")

# The first prefix that fits a file counts. A package may always import itself.
RULES = {
    "bridge/ops": Rule((), frozenset({"torch"})),
    "bridge/hf": Rule(
        (), frozenset({"torch", "transformers", "huggingface_hub", "numpy", "PIL", "safetensors", "tokenizers"})
    ),
    "bridge/mcore": Rule(
        (
            *("bridge.ops", "bridge.weight_map", "bridge.config_map", "bridge.cudnn", "bridge.resiliency", "errors"),
            "bridge.hf.configuration_gpt_oss_vision",
        ),
        frozenset({"torch", "transformers", "megatron"}),
    ),
    "bridge/resiliency.py": Rule((), frozenset()),
    "bridge/hf_attention.py": Rule(("bridge.ops.attention",), frozenset({"torch", "transformers"})),
    "bridge/weight_map.py": Rule((), frozenset()),
    "bridge/config_map.py": Rule(("bridge.hf.configuration_gpt_oss_vision", "errors"), frozenset()),
    "bridge/hf_int8.py": Rule(
        ("bridge.hf.configuration_gpt_oss_vision", "errors"), frozenset({"torch", "transformers", "torchao"})
    ),
    "bridge/cudnn.py": Rule((), frozenset()),
    "bridge/plugin.py": Rule(("bridge",), frozenset()),
    "conversion/dtypes.py": Rule((), frozenset({"torch"})),
    "conversion/engine": Rule(("conversion.dtypes", "errors", "terminal", "atomic")),
    "conversion/parameters.py": Rule(("bridge.ops", "bridge.weight_map", "errors"), frozenset({"torch"})),
    "conversion/messages.py": Rule(("errors",), frozenset()),
    "conversion/formats": Rule(("bridge", *BELOW_FORMATS)),
    "conversion/comparison": Rule(("bridge", *BELOW_FORMATS, "conversion.formats")),
    "conversion/lora.py": Rule(("bridge", *BELOW_FORMATS, "conversion.formats")),
    **{f"conversion/{task}.py": Rule(("bridge", *BELOW_TASKS)) for task in TASKS},
    "conversion": Rule(("bridge", "errors", "arguments", "atomic", "terminal")),
    "recipes/commands.py": Rule(
        ("recipes", "conversion", "bridge", "errors", "arguments", "atomic", "terminal"), frozenset()
    ),
    "recipes/pages": Rule((), frozenset({"jinja2", "markupsafe"})),
    "recipes/data": Rule(("recipes.pages", "bridge", "errors", "atomic", "terminal")),
    "recipes/inference": Rule(("recipes.data", "bridge", "errors", "atomic", "terminal")),
    "recipes/launch/plan.py": Rule((), frozenset()),
    "recipes/launch/torchrun.py": Rule((), frozenset({"torch"})),
    "recipes/launch/ft_launcher.py": Rule(
        (
            *("recipes.launch.plan", "recipes.launch.torchrun", "bridge.resiliency", "errors"),
            *(f"recipes.training.{name}" for name in ("outcome", "overrides", "stop_signals")),
        ),
        frozenset({"torch"}),
    ),
    "recipes/launch/site.py": Rule(("recipes.launch.plan", "errors"), frozenset({"yaml"})),
    "recipes/launch/site_check.py": Rule(
        ("recipes.launch.site", "recipes.launch.plan", "bridge.resiliency"), frozenset()
    ),
    "recipes/launch/nemo_run.py": Rule(
        ("recipes.launch", "recipes.catalog", "recipes.commands", "recipes.training.overrides", "errors"),
        frozenset({"nemo_run"}),
    ),
    "recipes/launch": Rule(
        (
            *("recipes.catalog", "recipes.commands", "bridge.resiliency", "errors", "arguments"),
            *(f"recipes.training.{name}" for name in ("metrics", "outcome", "overrides", "secrets")),
        ),
        frozenset(),
    ),
    "recipes/training/schema.py": Rule((), frozenset()),
    "recipes/training/values.py": Rule(("recipes.training.schema", "errors"), frozenset({"hydra", "omegaconf"})),
    "recipes/training/settings_file.py": Rule(
        ("recipes.training.schema", "recipes.training.values", "errors"), frozenset({"yaml"})
    ),
    "recipes/training/overrides.py": Rule(
        (*(f"recipes.training.{name}" for name in ("schema", "settings_file", "values")), "errors"), frozenset()
    ),
    "recipes/training": Rule(
        (
            *("recipes.data", "recipes.inference", "recipes.pages", "conversion.formats.hf_files"),
            *("bridge", "errors", "atomic", "terminal"),
        )
    ),
    "recipes/base.py": Rule(("recipes.data", "recipes.training", "bridge", "errors")),
    **{f"recipes/{task}.py": Rule(("recipes.base", "recipes.training.peft"), frozenset()) for task in RECIPE_FILES},
    "recipes/tiny.py": Rule(("recipes.base", "recipes.training.peft", "recipes.data", "bridge"), frozenset()),
    "recipes/catalog.py": Rule(("recipes.base", "errors"), frozenset()),
    "recipes/kernels.py": Rule(("recipes.catalog", "bridge.cudnn"), frozenset()),
    "recipes/sources.py": Rule(("recipes.catalog",), frozenset()),
    "recipes/quickstart": Rule(
        (
            *("recipes.data", "recipes.inference", "recipes.training", "recipes.base", "recipes.tiny"),
            *("conversion", "bridge", "errors", "atomic", "terminal"),
        )
    ),
    "recipes": Rule(()),
    "errors.py": Rule((), frozenset()),
    "arguments.py": Rule((), frozenset()),
    "atomic.py": Rule((), frozenset()),
    "terminal.py": Rule((), frozenset({"rich"})),
    "doctor.py": Rule(
        ("recipes.kernels", "recipes.launch.site", "recipes.launch.site_check"), frozenset({"torch", "packaging"})
    ),
    "cli.py": Rule(
        ("", "arguments", "doctor", "errors", "conversion.commands", "recipes.commands", "recipes.launch.commands"),
        frozenset(),
    ),
    "__init__.py": Rule(("bridge",), frozenset()),
    "bridge/__init__.py": Rule((), frozenset()),
}
UPSTREAM = {"bridge/mcore/upstream.py", *(f"bridge/mcore/cpu/{name}.py" for name in ("stand_ins", "runtime", "ranks"))}
# Attributes of providers and mappings that Megatron-Bridge sets, and that its own subclasses read.
HANDED_DOWN = {"_pg_collection"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split(".")) if module else ROOT
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """Line and name of each module that `file` imports: ours as `.bridge.ops`, others as `torch.nn`."""
    package = file.parent.relative_to(ROOT).parts
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield node.lineno, "." + (inner if exists(inner) else base)


def is_within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def rule_of(file: Path) -> tuple[str, Rule]:
    name = name_of(file)
    return next((package, rule) for package, rule in RULES.items() if name == package or name.startswith(f"{package}/"))


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_go_one_way(file: Path):
    package, rule = rule_of(file)
    allowed = (*rule.ours, package.removesuffix(".py").replace("/", "."))
    for line, module in imports_of(file):
        root = module.partition(".")[0]
        if module.startswith("."):
            assert is_within(module[1:], allowed), f"{name_of(file)}:{line} imports {module}, which {package} may not"
        elif root not in sys.stdlib_module_names and rule.others is not None:
            assert root in rule.others, f"{name_of(file)}:{line} imports {module}, which {package} may not"


def test_no_modules_import_each_other_in_a_circle():
    """At load time; an import within a function runs later."""
    graph = {}
    for file in SOURCES:
        module = "." + name_of(file).removesuffix(".py").removesuffix("__init__").replace("/", ".").strip(".")
        late = {node.lineno for function in ast.walk(tree_of(file)) if is_late(function) for node in within(function)}
        graph[module] = {name for line, name in imports_of(file) if name.startswith(".") and line not in late}
    graphlib.TopologicalSorter(graph).prepare()


def is_late(node: ast.AST) -> bool:
    is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return is_for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def within(node: ast.AST) -> list[ast.stmt]:
    return [inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom)]


def test_no_function_is_longer_than_60_lines_and_half_of_them_have_at_most_10():
    lengths = {
        f"{name_of(file)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for file in SOURCES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 60} == {}
    assert statistics.median(lengths.values()) <= 10


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_imports_within_the_package_are_relative_and_exist(file: Path):
    for line, module in imports_of(file):
        assert module.partition(".")[0] != "gpt_oss_vision", (
            f"{name_of(file)}:{line} imports {module}: write it relative"
        )
        assert not module.startswith(".") or exists(module[1:]), (
            f"{name_of(file)}:{line} imports {module}: no such file"
        )


def test_every_imported_package_is_a_direct_dependency():
    project = PROJECT["project"]
    lines = sum(project["optional-dependencies"].values(), project["dependencies"])
    wanted = {Requirement(line).name for line in lines}
    distributions = importlib.metadata.packages_distributions()
    for file in SOURCES:
        for line, module in imports_of(file):
            root = module.partition(".")[0]
            if root and root not in sys.stdlib_module_names:
                names = {name.lower().replace("_", "-") for name in distributions.get(root, ())}
                assert names & wanted, f"{name_of(file)}:{line} imports {root}, of {names or 'nothing installed'}"


def test_direct_dependencies_are_ranges_that_uv_pins_exactly():
    """Ranges for who installs the wheel beside other frameworks, exact versions for who works on it."""
    project, uv = PROJECT["project"], PROJECT["tool"]["uv"]
    pins = dict(line.split("==") for line in uv["constraint-dependencies"])
    ranges = [Requirement(line) for line in project["dependencies"]]
    assert [requirement.name for requirement in ranges] == list(pins)
    assert [str(range_) for range_ in ranges if not range_.specifier.contains(pins[range_.name])] == []
    assert [str(range_) for range_ in ranges if not range_.specifier] == []
    groups = {**project["optional-dependencies"], **PROJECT["dependency-groups"], "": uv["constraint-dependencies"]}
    loose = [line for lines in groups.values() for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)]
    assert loose == []


def test_the_package_list_is_the_folders():
    folders = {file.parent.relative_to(ROOT) for file in SOURCES}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == {
        ".".join(["gpt_oss_vision", *folder.parts]) for folder in folders
    }
    assert [folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()] == []


def test_the_version_is_the_installed_one():
    assert gpt_oss_vision.__version__ == importlib.metadata.version("gpt-oss-vision")


def test_importing_the_package_loads_no_framework():
    script = "import gpt_oss_vision, json, sys; print(json.dumps([name.partition('.')[0] for name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "megatron", "numpy"} & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "name",
    ["cli.py", "conversion/commands.py", "recipes/commands.py", "recipes/launch/commands.py", "arguments.py"],
)
def test_parsers_import_the_standard_library_alone(name: str):
    """At module level, so that `--help` and a usage error take less than half a second."""
    top = [node for node in tree_of(ROOT / name).body if isinstance(node, ast.Import | ast.ImportFrom)]
    lines = {node.lineno for node in top}
    modules = {module for line, module in imports_of(ROOT / name) if line in lines}
    light = {".", ".arguments", ".errors", ".conversion.commands", ".recipes.commands", ".recipes.launch.commands"}
    assert {module for module in modules - light if module.partition(".")[0] not in sys.stdlib_module_names} == set()


def test_every_public_name_is_listed_and_defined_in_its_home():
    homes = dict(gpt_oss_vision._HOME)
    assert set(homes) == set(gpt_oss_vision.__all__) - {"register", "__version__"}
    assert set(gpt_oss_vision.__all__) <= set(dir(gpt_oss_vision))
    for name, home in homes.items():
        file = ROOT.joinpath(*home.split(".")[1:]).with_suffix(".py")
        assert name in {node.name for node in tree_of(file).body if isinstance(node, ast.ClassDef)}, name


def test_type_checkers_see_the_same_public_names():
    typed = next(node for node in tree_of(ROOT / "__init__.py").body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: f".{node.module}" for node in imports for alias in node.names} == gpt_oss_vision._HOME


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="GPTOSSVisionTypo"):
        _ = gpt_oss_vision.GPTOSSVisionTypo


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def names_from_megatron(tree: ast.Module) -> Iterator[tuple[int, str, str]]:
    """Line, imported name and local name of each import from Megatron."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_within(alias.name, ("megatron",)):
                    yield node.lineno, alias.name, alias.asname or "megatron"
        elif isinstance(node, ast.ImportFrom) and not node.level and is_within(node.module or "", ("megatron",)):
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}", alias.asname or alias.name


def private_touches(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of each private name of Megatron that a file imports, reads, sets, or inherits and then uses."""
    bound = set()
    for line, imported, name in names_from_megatron(tree):
        bound.add(name)
        if any(is_private(part) for part in imported.split(".")):
            yield line, imported
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_of(node) in bound:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and root_of(node.func) in {"getattr", "setattr"}:
            name = node.args[1]
            if root_of(node.args[0]) in bound and isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield node.lineno, str(name.value)
    yield from inherited_touches(tree, bound)


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def inherited_touches(tree: ast.Module, bound: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of each `self._name` in subclasses of Megatron's classes that no class of the file defines."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    heirs: set[str] = set()
    for node in classes:  # in the order of the file, so a base comes before its heirs
        bases = {root_of(base.value if isinstance(base, ast.Subscript) else base) for base in node.bases}
        if bases & (bound | heirs):
            heirs.add(node.name)
    touched = [
        node for heir in classes if heir.name in heirs for node in ast.walk(heir) if isinstance(node, ast.Attribute)
    ]
    of_self = [node for node in touched if isinstance(node.value, ast.Name) and node.value.id in {"self", "super"}]
    own = {node.attr for node in of_self if isinstance(node.ctx, ast.Store)}
    own |= HANDED_DOWN | {node.name for heir in classes for node in ast.walk(heir) if isinstance(node, ast.FunctionDef)}
    yield from ((node.lineno, node.attr) for node in of_self if is_private(node.attr) and node.attr not in own)


@pytest.mark.parametrize("file", [file for file in SOURCES if name_of(file) not in UPSTREAM], ids=name_of)
def test_private_names_of_megatron_stay_in_upstream_and_cpu(file: Path):
    assert [f"{name_of(file)}:{line} {name}" for line, name in private_touches(tree_of(file))] == []


@pytest.mark.parametrize(
    "code",
    [
        "from megatron.core import _private",
        "from megatron.core._private import name",
        "import megatron.core.random as r\nr._state()",
        "import megatron.core\nmegatron.core._x = 1",
        "from megatron.core import Router\nRouter._route",
        "from megatron.core import random\nsetattr(random, '_state', 1)",
        "from megatron.core import Router\nclass A(Router): pass\nclass B(A):\n    def f(self): self._route()",
    ],
)
def test_a_private_name_of_megatron_is_found_however_it_is_reached(code: str):
    assert len(list(private_touches(ast.parse(code)))) == 1


@pytest.mark.parametrize(
    ("name", "lines"),
    {
        "plain/model.py": 250,
        "plain/checkpoint.py": 75,
        "plain/train.py": 60,
        "plain/rl.py": 150,
        "plain/offload.py": 60,
        "rl/grpo.py": 60,
    }.items(),
)
def test_an_example_is_read_in_one_sitting(name: str, lines: int):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= lines


def test_torch_load_reads_weights_only():
    for file in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", f"{name_of(file)}:{node.lineno}"


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_file_names_a_machine_or_a_registry():
    machine = re.compile(r"/(?:work|root|home|Users)/\w|pypi\.org|pythonhosted|npmjs|deb\.debian")
    for file in tracked_files():
        if file == Path(__file__):
            continue
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            assert not machine.search(line), f"{name_of(file)}:{number} {line.strip()}"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_lock_file_is_tracked():
    assert ROOT / "uv.lock" not in tracked_files()


COMMANDS = next(
    action.choices for action in cli.parser()._actions if action.dest == argparse.SUPPRESS and action.choices
)


def commands_in(text: str) -> Iterator[list[str]]:
    """The words after `gpt-oss-vision` wherever it is written as a command with arguments."""
    for match in re.finditer(r"(?<![\w./-])gpt-oss-vision((?: +(?:--)?[\w.,=/-]+)+)", text):
        yield match[1].split()


@pytest.mark.parametrize("file", [*PAGES, *SOURCES], ids=name_of)
def test_commands_that_are_written_down_exist(file: Path):
    code = "\n".join(
        re.findall(r"```.*?```|`[^`]+`", file.read_text(), re.DOTALL) if file in PAGES else [file.read_text()]
    )
    for name, *words in commands_in(code):
        assert name in {*COMMANDS, "--help"}, f"{name_of(file)} speaks of `gpt-oss-vision {name}`"
        command = COMMANDS[name] if words else None
        if name in {"convert", "data"} and words:
            command = command._subparsers._group_actions[0].choices[words.pop(0)]
        options = command._option_string_actions.keys() if command else set()
        for word in words:
            assert not word.startswith("--") or word.split("=")[0] in options, f"{name_of(file)}: {name} {word}"
        if name in ("train", "recipes") and file in PAGES:
            parse([word for word in words if "=" in word])
            recipes = [recipe for word in words[:1] for recipe in word.split(",") if not recipe.isupper()]
            assert all(find(recipe) for recipe in recipes if recipe.startswith("gpt_oss"))


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_just_recipes_that_are_written_down_exist(file: Path):
    recipes = set(re.findall(r"^([a-z-]+)(?: \*?\w+)*:", (ROOT / "justfile").read_text(), re.MULTILINE))
    for recipe in re.findall(r"\bjust ([a-z][a-z-]+)`", file.read_text()):
        assert recipe in recipes, f"{name_of(file)} speaks of `just {recipe}`"


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_python_on_the_pages_imports_what_exists(file: Path):
    for snippet in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and is_within(node.module or "", ("gpt_oss_vision",)):
                for alias in node.names:
                    assert defines(node.module or "", alias.name), f"{name_of(file)}: {node.module} has no {alias.name}"


def defines(module: str, name: str) -> bool:
    if module == "gpt_oss_vision":
        return name in gpt_oss_vision.__all__
    home = module.removeprefix("gpt_oss_vision.")
    path = ROOT.joinpath(*home.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    is_defined = file.is_file() and name in {getattr(node, "name", None) for node in tree_of(file).body}
    return is_defined or exists(f"{home}.{name}")
