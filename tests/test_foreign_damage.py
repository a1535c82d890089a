"""Damaged files of networks from elsewhere: one line, or a network."""

from __future__ import annotations

import io
import json
import warnings
import zipfile

import numpy as np
import pytest
import torch
from modules import (
    D,
    module,
    program,
    script,
)

from lipexp.config import ConfigError
from lipexp.foreign import read


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Searches and attacks of little effort, of which there are tests of their own."""
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    monkeypatch.setattr("lipexp.measured.attack.STEPS", 20)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    net = module("relu")
    torch.save(net.state_dict(), folder / "net.pt")
    made = [program(net, folder / "net.pt2"), script(net, folder / "net.ts"), folder / "net.pt"]
    try:
        import onnx  # noqa: F401

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (torch.zeros(2, D),), folder / "net.onnx", dynamo=False)
        made.append(folder / "net.onnx")
    except ImportError:
        pass
    return {path.suffix: path.read_bytes() for path in made}


@pytest.mark.parametrize("suffix", [".pt2", ".ts", ".pt", ".onnx"])
def test_a_damaged_file_is_one_line_or_a_network(suffix, files, tmp_path):
    content = files.get(suffix) or pytest.skip("needs onnx")
    draws, file = np.random.default_rng(0), tmp_path / f"net{suffix}"
    damaged = [b"", content[: len(content) // 2], content[::-1], b"PK" + content, content + content]
    for _ in range(60):
        own = bytearray(content)
        for place in draws.integers(len(own), size=int(draws.integers(1, 9))):
            own[place] ^= 1 << int(draws.integers(8))
        damaged.append(bytes(own))
    lines = []
    for own in damaged:
        file.write_bytes(own)
        try:
            assert read(file, D, True, "relu").network.n_inputs >= 1
        except ConfigError as error:
            lines.append(str(error))
    assert len(lines) >= 10
    assert not any("\n" in line for line in lines)


def test_sizes_that_a_program_claims_are_not_believed(files, tmp_path):
    file = tmp_path / "net.pt2"
    with zipfile.ZipFile(io.BytesIO(files[".pt2"])) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = next(name for name in parts if name.endswith("model_weights_config.json"))
    for change in (
        {"sizes": [{"as_int": 2**40}, {"as_int": 4}]},
        {"strides": [{"as_int": 2**40}, {"as_int": 1}]},
        {"storage_offset": {"as_int": 2**40}},
        {"storage_offset": {"as_int": -1}},
        {"sizes": [{"as_int": 2**20}, {"as_int": 2**20}], "strides": [{"as_int": 0}, {"as_int": 0}]},
    ):
        content = json.loads(parts[config])
        content["config"]["0.weight"]["tensor_meta"] |= change
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, json.dumps(content) if name == config else part)
        with pytest.raises(ConfigError, match=r"claims more numbers for 0\.weight"):
            read(file, D, True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/models/model.json", " " * 10**6)
    with pytest.raises(ConfigError, match="is compressed"):
        read(file, D, True)


# Other libraries -------------------------------------------------------------------------------------------------
