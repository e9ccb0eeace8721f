"""The project itself: light imports, one version, complete constraints, small files, hooks run by CI."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gangline

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE_BYTES = 8 * 2**20
MAX_FUNCTION_LINES = 80
HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "safetensors", "pydantic")


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after ``code``."""
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stdout.splitlines()[-1].split()}


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("gangline")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gangline is not installed here, only importable")


def test_import_is_light():
    assert not modules_after("import gangline").intersection(HEAVY)


def test_help_is_light():
    code = "from typer.testing import CliRunner\nfrom gangline.cli.main import app\n"
    code += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    assert not modules_after(code).intersection({"torch", "transformers"})


def test_public_names_resolve():
    assert all(getattr(gangline, name) is not None for name in gangline.__all__)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = gangline.no_such_name


def test_version_matches_metadata():
    assert installed().version == gangline.__version__


def test_changelog_names_this_version():
    assert f"## [{gangline.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_direct_dependency():
    extras = project()["optional-dependencies"].values()
    declared = [*project()["dependencies"], *chain.from_iterable(extras)]
    pins = pinned()
    for requirement in map(Requirement, declared):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing from constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the pinned {version}"


def test_imports_are_declared():
    """What the package imports is a dependency or in an extra, and every dependency is imported."""
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
    distributions = importlib.metadata.packages_distributions()
    required = {canonicalize_name(Requirement(item).name) for item in project()["dependencies"]}
    extras = chain.from_iterable(project()["optional-dependencies"].values())
    declared = required | {canonicalize_name(Requirement(item).name) for item in extras}
    used, undeclared = set(), set()
    for module in imported - sys.stdlib_module_names - {"gangline"}:
        # Several distributions share a namespace such as `cuda`.
        names = {canonicalize_name(name) for name in distributions.get(module, [module])}
        used |= names
        if not names & declared:
            undeclared.add(module)
    assert undeclared == set()
    assert required - used == set()


def test_constraints_cover_what_dev_installs():
    """Everything reachable from ``gangline[dev]`` that is installed here is pinned."""
    pins, seen = pinned(), set()
    installed()
    queue = [Requirement("gangline[dev]")]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for child in map(Requirement, requires):
            extras = requirement.extras or {""}
            wanted = child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras)
            key = (canonicalize_name(child.name), frozenset(child.extras))
            if wanted and key not in seen:
                seen.add(key)
                queue.append(child)
    names = {name for name, _ in seen if _is_installed(name)}
    builds_of_torch = {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert names - pins.keys() - builds_of_torch - {"gangline"} == set()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_constraints_have_no_local_versions():
    assert not [name for name, version in pinned().items() if "+" in version or not version]


def test_tracked_files_are_small():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    )
    paths = [ROOT / name for name in tracked.stdout.decode().split("\0") if name]
    assert paths
    assert [path for path in paths if path.is_file() and path.stat().st_size > MAX_FILE_BYTES] == []


def test_package_data_is_installed():
    distribution = installed()
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        pytest.skip("an editable installation copies no data")
    files = {str(file) for file in distribution.files or []}
    data = [
        path
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".so")
    ]
    assert (ROOT / "src/gangline/py.typed") in data
    assert {str(path.relative_to(ROOT / "src")) for path in data} <= files


def test_functions_are_short():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert long == []


def test_ci_runs_every_hook():
    """Hooks that are tests run with the test suite."""
    entries = re.findall(
        r"^\s+entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text(), flags=re.MULTILINE
    )
    script = (ROOT / ".ci/run").read_text()
    hooks = [entry for entry in entries if not entry.startswith("pytest")]
    assert hooks
    assert [hook for hook in hooks if hook not in script] == []


def test_native_core_is_built_where_it_can_be():
    """A build of the extension that fails falls back to pure Python; this keeps that from going unseen."""
    from gangline.kernels.cpu import native

    installed()
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not any(map(shutil.which, ("c++", "g++", "clang++"))) or not headers.is_file():
        pytest.skip("no C++ compiler or no Python headers: the package is pure Python here")
    assert native() is not None


def test_readme_tables_come_from_the_results():
    """No number in README's tables is typed by hand."""
    script = ROOT / "scripts" / "readme_tables.py"
    command = [sys.executable, str(script), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
