"""The wheel: it carries conf/, and runs from any folder without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        ROOT,
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_its_configuration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        assert f"lipexp/conf/{path.relative_to(ROOT / 'conf').as_posix()}" in names
    for path in sorted((ROOT / "lipexp").rglob("*.py")):
        assert path.relative_to(ROOT).as_posix() in names
    assert not any(name.startswith(("tests/", "outputs/")) for name in names)


def test_an_installed_wheel_trains_in_another_folder(wheel, tmp_path):
    """A fresh environment with the wheel alone; the dependencies are lent from this one, without its lipexp."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    pip = [home / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(*command):
        return subprocess.run(
            [str(part) for part in command],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    where = run(
        home / "bin" / "python", "-c", "import lipexp, lipexp.config as c; print(lipexp.__file__, c.conf_dir())"
    )
    assert where.stdout.split() == [str(site / "lipexp" / "__init__.py"), str(site / "lipexp" / "conf")]
    done = run(home / "bin" / "lipexp", "train", "experiment=debug", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert len(list(elsewhere.glob("outputs/*/*/metrics.json"))) == 1
    swept = run(home / "bin" / "lipexp", "train", "-m", "experiment=debug", "device=cpu", "seed=0,1")
    assert swept.returncode == 0, swept.stderr
    assert len(list(elsewhere.glob("outputs/*/*/[01]/metrics.json"))) == 2
