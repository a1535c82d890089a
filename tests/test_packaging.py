"""The wheel: it carries conf/, and runs from any folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from commands import TINY, statuses

ROOT = Path(__file__).resolve().parent.parent
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_trains_in_another_folder(tmp_path):
    """In a fresh environment with the wheel alone; dependencies are lent from this one, without its lipexp."""
    build = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT)
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "conf").rglob("*.yaml"):
        assert f"lipexp/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for path in (ROOT / "lipexp").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)

    home, elsewhere = tmp_path / "venv", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    install = (*PIP, "--python", home / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    subprocess.run(install, check=True, capture_output=True)
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def run(command: str, *arguments: str) -> str:
        line = [home / "bin" / command, *arguments]
        done = subprocess.run(line, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    shown = run("python", "-c", "import lipexp, lipexp.config as c; print(lipexp.__file__, c.conf_dir())")
    assert shown.split() == [str(site / "lipexp" / "__init__.py"), str(site / "lipexp" / "conf")]
    options = ("hydra.launcher.executor=process", "hydra.sweep.dir=s")
    shown = run("lipexp", "train", "-m", *TINY, *options, "act=relu,groupsort")
    assert statuses(elsewhere / "s") == ["ok", "ok"]
    assert "\x1b" not in shown  # plain lines where the output is no terminal
