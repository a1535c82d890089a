"""Folders that are damaged or made to harm: every reader answers in time, with a result or one line a refusal."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import INLINE, TINY, content, time_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lipexp as package
from lipexp import cli
from lipexp.config import ConfigError

GIB = 2**20  # of ru_maxrss, which counts KiB

TRAINED = {
    "run": (*TINY, "hydra.run.dir=run"),
    "sweep": ("-m", *TINY, INLINE, "act=relu,abs", "hydra.sweep.dir=sweep"),
    "search": (
        *("-m", *TINY, INLINE, "hydra/sweeper=search", "hydra.sweeper.trials=2", "loss.margin=interval(0.1,0.9)"),
        "hydra.sweep.dir=search",
    ),
}


def command(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr("sys.path", list(sys.path))
        patch.setattr("sys.argv", ["lipexp", *arguments])
        code = cli.main()
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A folder that holds a run, a sweep and a search."""
    root = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for arguments in TRAINED.values():
            code, _, err = command("train", *arguments)
            assert code == 0, err
    return root


# Damages ---------------------------------------------------------------------------------------------------------

ODD = [
    *(None, True, -5, 10**400, 1e999, "", "x", [], {}, [1, "2"], {"a": {"b": None}}, [[[]]]),
    *("\x1b]0;title\x07\n\r", "\ud800", "${oc.env:HOME}", "../../outside", "lipexp.modules.Network", "os.system"),
]


def places(node: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in nested objects and lists."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


def odd_value(file: Path, draw: Callable[..., Any]) -> None:
    """Another value, or a key more, somewhere in a JSON or YAML file; elsewhere, bytes in the middle."""
    if file.suffix not in (".json", ".yaml"):
        return flipped(file, draw)
    tree = json.loads(file.read_text()) if file.suffix == ".json" else yaml.safe_load(file.read_text())
    container, key = draw(st.sampled_from(places(tree)))
    container[key] = draw(st.sampled_from(ODD))
    text = json.dumps(tree) if file.suffix == ".json" else yaml.dump(tree)
    file.write_bytes(text.encode(errors="surrogatepass"))


def flipped(file: Path, draw: Callable[..., Any]) -> None:
    data = bytearray(file.read_bytes() or b"\0")
    for _ in range(draw(st.integers(1, 8))):
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(data)


def instead(make: Callable[[Path], Any]) -> Callable[..., None]:
    def replace(file: Path, draw: Callable[..., Any]) -> None:
        file.unlink()
        make(file)

    return replace


DAMAGES: dict[str, Callable[..., None]] = {
    "odd value": odd_value,
    "flipped": flipped,
    "cut": lambda file, draw: os.truncate(file, draw(st.integers(0, file.stat().st_size))),
    "huge": lambda file, draw: os.truncate(file, 2**42),
    "junk": lambda file, draw: file.write_bytes(draw(st.binary(max_size=99))),
    "deep": lambda file, draw: file.write_text('{"a": ' * 10**5 + "[" * 10**5),
    "bomb": lambda file, draw: file.write_text("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]\n"),
    "gone": instead(lambda file: None),
    "pipe": instead(os.mkfifo),
    "folder": instead(Path.mkdir),
    "link to a device": instead(lambda file: file.symlink_to("/dev/zero")),
    "link to itself": instead(lambda file: file.symlink_to(file.name)),
    "link out": instead(lambda file: file.symlink_to(Path("outside", "file").absolute())),
    "link to nothing": instead(lambda file: file.symlink_to(Path("outside", "new").absolute())),
}


def move_out(folder: Path, draw: Callable[..., Any]) -> None:
    """A folder in it becomes a link to one elsewhere."""
    inner = draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_dir())))
    shutil.copytree(inner, "outside/folder")
    shutil.rmtree(inner)
    inner.symlink_to(Path("outside", "folder").absolute())


# Answers ---------------------------------------------------------------------------------------------------------


def load_all(folder: str) -> None:
    loaded = package.load(folder)
    for run in loaded if isinstance(loaded, package.loading.LoadedRuns) else [loaded]:
        run.network([[0.0, 0.0]])
        repr(run)
        for name in ("history", "gradients", "radii"):
            run.table(name)


def check_answers(kind: str) -> None:
    asked = [("report", kind), ("certify", kind, "--max-regions", "0")]
    if kind != "run":
        asked.append(("train", *TRAINED[kind], "resume=true"))
    for arguments in asked:
        with time_limit():
            code, out, err = command(*arguments)
        assert code in (0, 1, 2), arguments
        assert "Traceback" not in out + err
        for line in err.splitlines():
            assert line.startswith("lipexp: "), (arguments, line)
        assert (out + err).replace("\n", "").isprintable(), (arguments, out + err)
    with time_limit():
        try:
            load_all(kind)
        except ConfigError as refused:
            reason = str(refused)
        else:
            reason = ""
    assert reason.isprintable()


def check_damage(originals: Path, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        kind = data.draw(st.sampled_from(sorted(TRAINED)))
        folder = Path(shutil.copytree(originals / kind, kind))
        Path("outside").mkdir()
        Path("outside/file").write_text("mine")
        if data.draw(st.integers(0, 9)) == 0:
            move_out(folder, data.draw)
        paths = (path for path in folder.rglob("*") if path.suffix != ".png" and path.name != "overrides.yaml")
        files = sorted(path for path in paths if path.is_file())
        for file in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
            DAMAGES[data.draw(st.sampled_from(sorted(DAMAGES) + 4 * ["odd value"]))](file, data.draw)
        before = content(Path("outside"))
        check_answers(kind)
        assert content(Path("outside")) == before
    shutil.rmtree(root)


def test_damaged_folders_are_answered(originals, tmp_path_factory):
    @settings(max_examples=6, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        check_damage(originals, data, tmp_path_factory)

    check()


@pytest.mark.slow
def test_many_damaged_folders_are_answered(originals, tmp_path_factory):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=150, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def check(data):
        check_damage(originals, data, tmp_path_factory)

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * GIB
