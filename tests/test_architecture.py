"""Imports point one way: a module imports its own package and lower floors only."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "racm3_jax"

FLOORS = [
    {"limits"},
    {"types", "vocab", "storage", "buckets"},
    {"own_files", "progress", "checksums", "worlds"},
    {"documents", "sharding", "checkpoints", "metrics"},
    {"tokenizers", "model", "index"},
    {"memory"},
    {"retrieval"},
    {"sequences"},
    {"training", "generation"},
    {"evaluation", "porting"},
    {"wiring"},
    {"compilation", "flagworld"},
    {"run", "fit_plan"},
    {"quickstart", "fit", "sweeps", "doctor", "demo"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
NUMPY_ONLY = (
    "documents",
    "flagworld/__init__.py",
    "flagworld/world",
    "retrieval/strategy.py",
    "sequences/causal_masking.py",
    "sequences/packing.py",
    "sequences/layout.py",
    "types.py",
    "vocab.py",
    "worlds.py",
)
SAYS_NOTHING = {"utils", "util", "common", "helpers", "misc", "base"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports_of(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_of(path: pathlib.Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = package_of(path)
    if own == "__init__":
        return
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] != "racm3_jax" or len(parts) < 2 or parts[1] == own:
            continue
        target = parts[1]
        if target not in FLOOR:
            continue  # a name of racm3_jax/__init__.py
        assert FLOOR[target] < FLOOR[own], f"{path} imports {name}"


def test_lower_floors_name_the_room_of_flagworld_only_in_the_registry():
    found = {
        package_of(path)
        for path in MODULES
        if "racm3_jax.flagworld" in path.read_text()
        and FLOOR.get(package_of(path), 0) < FLOOR["flagworld"]
    }
    assert found == {"worlds"}


def test_every_package_has_a_floor():
    names = {package_of(p) for p in MODULES} - {"__init__"}
    assert names <= set(FLOOR), names - set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_torch_and_no_tensorflow(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & {"torch", "tensorflow", "pickle"}
    assert path.stem not in SAYS_NOTHING


@pytest.mark.parametrize("place", NUMPY_ONLY)
def test_host_code_is_numpy_only(place):
    target = PACKAGE / place
    for path in target.rglob("*.py") if target.is_dir() else [target]:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"jax", "flax", "optax"}, path


def test_configs_are_data_only():
    for path in (ROOT / "configs").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= {"ml_collections", "configs"}, path


def test_only_wiring_reads_config_dicts():
    for path in MODULES:
        if package_of(path) in {"wiring", "commands"}:
            continue
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert "ml_collections" not in roots, path


def test_top_level_is_fixed():
    """Of tracked files: the README's commands write their outputs there as well."""
    import subprocess

    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    # Whoever owns the clone: a container often runs the tests as another user.
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    kept = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    visible = {path.split("/")[0] for path in kept if not path.startswith(".")}
    assert visible == {
        "setup.py", "README.md", "racm3_jax", "configs", "experiments", "tests", "colab",
        "LICENSE", "NOTICE", "CONTRIBUTING.md", "CHANGES.md",
    }  # fmt: skip


def test_importing_the_package_imports_no_jax():
    import subprocess
    import sys

    code = "import racm3_jax, sys; assert 'jax' not in sys.modules; dir(racm3_jax)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_no_two_test_files_share_a_name():
    """pytest imports them only by their names."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(names)
