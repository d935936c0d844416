"""The direction of imports, which run one way: server -> engine -> kernels.

Imports between the engine's rooms run one way too. The client imports none of the three packages, and only
the server's extract imports the client.
"""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FORBIDDEN = {
    "server/logitserve": {"torch", "logitkernels"},
    "engine/logitengine": {"logitserve", "fastapi", "starlette", "uvicorn"},
    "kernels/logitkernels": {"logitserve", "logitengine", "fastapi", "transformers"},
    "clients/python/logitclient": {"logitserve", "logitengine", "logitkernels", "fastapi"},
}

ROOMS = {
    "link": {"schedule", "model", "run", "engine", "process"},
    "schedule": {"model", "run", "engine", "process"},
    "grammar": {"link", "schedule", "model", "run", "engine", "process"},
}
"""Rooms of the engine that are free of torch, each with the modules that it must not import."""

UNSAFE = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def imported_packages(source: str) -> set[str]:
    packages: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.split(".")[0])
    return packages


def imported_modules(source: str) -> set[str]:
    """Return the dotted names of imports; ``from a import b`` gives ``a`` and ``a.b``."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def our_sources() -> list[Path]:
    return [path for folder in FORBIDDEN for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_layer_imports_only_what_lies_below_it(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        climbing = imported_packages(path.read_text()) & FORBIDDEN[folder]
        assert not climbing, f"{path.relative_to(ROOT)} imports {climbing}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_without_torch_knows_no_room_with_it(room: str) -> None:
    forbidden = {f"logitengine.{name}" for name in ROOMS[room]}
    for path in sorted((ROOT / "engine/logitengine" / room).glob("*.py")):
        source = path.read_text()
        assert not imported_packages(source) & {"torch", "transformers", "logitkernels"}, path
        assert not {
            module for module in imported_modules(source) if ".".join(module.split(".")[:2]) in forbidden
        }, path


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_without_torch_loads_none(room: str) -> None:
    names = [
        f"logitengine.{room}.{path.stem}" for path in (ROOT / "engine/logitengine" / room).glob("[!_]*.py")
    ]
    assert names
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    for path in our_sources():
        source = path.read_text()
        assert not imported_packages(source) & UNSAFE, path
        for call in ("trust_remote_code=True", "torch.load(", "shell=True"):
            assert call not in source, f"{path.relative_to(ROOT)} has {call}"


def test_the_server_process_never_loads_torch() -> None:
    code = "import sys, logitserve.cli, logitserve.http.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_extract_imports_the_client() -> None:
    importers = {
        path.parent
        for folder in ("server/logitserve", "engine/logitengine", "kernels/logitkernels")
        for path in (ROOT / folder).rglob("*.py")
        if "logitclient" in imported_packages(path.read_text())
    }
    assert importers == {ROOT / "server/logitserve/extract"}


def test_serving_never_loads_the_client() -> None:
    code = "import sys, logitserve.cli, logitserve.http.app; sys.exit('logitclient' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_wheel_carries_every_package() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(build["targets"]["wheel"]["packages"]) == FORBIDDEN.keys()
    assert {ROOT / folder for folder in build["dev-mode-dirs"]} == {
        (ROOT / package).parent for package in FORBIDDEN
    }


def test_module_folders_do_not_shadow_packages() -> None:
    for folder in ("server", "engine", "kernels", "clients"):
        assert not (ROOT / folder / "__init__.py").exists()
