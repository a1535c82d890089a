"""lipexp certify NET --data FILE: what it shows, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

# Of constant 5, and 4 and 7 for p = 1 and inf.
HAND = {
    "weight": torch.tensor([[3.0, 4.0]]),
    "bias": torch.tensor([1.0]),
}


@pytest.fixture(autouse=True)
def brief(monkeypatch, tmp_path):
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.chdir(tmp_path)
    torch.save(HAND, "net.pt")
    pd.DataFrame({"a": [1.0, -1, 0], "b": [1.0, -1, 0], "y": [1, 1, 0]}).to_csv("points.csv", index=False)


def certify(lipexp, words: str):
    return lipexp("certify", *words.split())


def three_classes() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))


def test_what_is_proven_is_shown_and_written(lipexp):
    done = certify(lipexp, "net.pt --data points.csv --act relu --attack --radii 0.5 --json a.json -o r.csv")
    assert (done.code, done.err) == (0, "")
    first, *rest = done.out.splitlines()
    assert first == "net.pt  2 -> 1  on 3 points"
    assert any(line.startswith("‖∇f‖₂  measured 5 ≤ ") for line in rest)
    assert "certified accuracy within ‖δ‖₂ ≤ 0.5: 0.3333" in done.out
    assert "attack on 3 points: 0 flipped within their radius" in done.out
    found = json.loads(Path("a.json").read_text())
    assert (found["net"], found["data"], found["rounding"], found["notes"]) == ("net.pt", "points.csv", 0.0, [])
    assert found["lipschitz"]["certified"] == pytest.approx(5)
    assert found["robustness"]["test"]["certified_accuracy"] == {"0.5": pytest.approx(1 / 3)}
    assert found["attack"]["flips_inside"] == 0
    assert len(found["model_sha256"]) == 64
    table = pd.read_csv("r.csv")
    np.testing.assert_allclose(table["radius"], [8 / 5, 6 / 5, 1 / 5], rtol=1e-12)
    assert table["correct"].tolist() == [1, 0, 0]


@pytest.mark.parametrize(("p", "constant"), [("1", 4), ("2", 5), ("inf", 7)])
def test_every_norm_is_certified(p, constant, lipexp):
    done = lipexp("certify", "net.pt", "--data", "points.csv", "--act", "relu", "--p", p, "--json", "found.json")
    assert done.code == 0
    found = json.loads(Path("found.json").read_text())
    assert found["lipschitz"]["certified"] == pytest.approx(constant)


def test_columns_are_taken_by_their_names_or_in_their_order(lipexp):
    helper = pytest.importorskip("onnx").helper
    numbers = pytest.importorskip("onnx").numpy_helper.from_array(np.array([[3], [4]], dtype=np.float32), "w")
    nodes = [helper.make_node("Concat", ["a", "b"], ["x"], axis=1), helper.make_node("MatMul", ["x", "w"], ["f"])]
    inputs = [helper.make_tensor_value_info(name, 1, ["N", 1]) for name in ("a", "b")]
    outputs = [helper.make_tensor_value_info("f", 1, ["N", 1])]
    model = helper.make_model(
        helper.make_graph(nodes, "net", inputs, outputs, [numbers]),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    Path("net.onnx").write_bytes(model.SerializeToString())
    for table, known in (
        ({"b": [1.0], "extra": ["x"], "a": [2.0]}, 10),
        ({"b": [1.0], "c": [2.0]}, 11),
        ({"": [7], "u": [2.0], "v": [1.0]}, 10),
    ):
        pd.DataFrame(table).to_csv("own.csv", index=False)
        done = certify(lipexp, "net.onnx --data own.csv -o r.csv --force")
        assert (done.code, done.err) == (0, "")
        assert pd.read_csv("r.csv")["f"].tolist() == [known]


def test_arrays_and_their_classes_are_read(lipexp):
    net = three_classes()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 2),)), "net.pt2")
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    np.save("x.npy", x.double().numpy())  # mapped, and not writable
    np.save("y.npy", net(x).argmax(dim=1).numpy())
    done = certify(lipexp, "net.pt2 --data x.npy --target y.npy --radii 1e-9 --max-regions 0")
    assert (done.code, done.err) == (0, "")
    assert "certified accuracy within ‖δ‖₂ ≤ 1e-09: 1 " in done.out
    done = certify(lipexp, "net.pt2 --data x.npy --max-regions 0")
    assert "on 30 points, whose classes are the predicted ones" in done.out
    done = certify(lipexp, "net.pt2 --data x.npy --task regression --json found.json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(Path("found.json").read_text())["robustness"] is None


def test_rounded_numbers_and_what_is_left_off_are_said(lipexp):
    torch.save({name: part.double() * (1 + 2.0**-26) for name, part in HAND.items()}, "double.pt")
    done = certify(lipexp, "double.pt --data points.csv --act relu")
    assert "rounded to float32: the largest relative change is 1.5e-8" in done.out
    net = nn.Sequential(*three_classes(), nn.Softmax(1)).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 2),)), "net.pt2")
    assert "left off behind the outputs: softmax" in certify(lipexp, "net.pt2 --data points.csv").out


PICKLED = (
    "is neither an ONNX file (.onnx), a program of torch.export or TorchScript, nor a plain state dict: it holds "
    "a pickled module, or another object that is no tensor; save its state_dict(), or torch.export.save it\n"
)
REFUSED = {
    "net.pt": "RUN=net.pt: is no folder; a network from elsewhere needs its points, as --data",
    "gone --data points.csv": "NET=gone: does not exist",
    ". --data points.csv": "NET=.: is no file",
    "net.pt net.pt --data points.csv": "NET=net.pt net.pt: must be one file, as --data is given",
    "net.pt --data points.csv": "NET=net.pt: holds weights alone: name the activation with --act",
    "net.pt --data gone.csv --act relu": "--data=gone.csv: does not exist",
    "net.pt --data gone.npy --act relu": "--data=gone.npy: does not exist",
    "net.pt --data net.pt --act relu": "--data=net.pt: must end in .csv, .tsv, .txt, .parquet, .pq",
    "net.pt --data three.csv --act relu": "--data=three.csv: has 3 columns (a, b, c), the network 2 inputs",
    "net.pt --data text.csv --act relu": "--data=text.csv: its column 'b' holds no numbers",
    "net.pt --data holes.csv --act relu": "--data=holes.csv: row 2, column 'a' is nan, no finite number",
    "net.pt --data empty.csv --act relu": "--data=empty.csv: has no rows",
    "net.pt --data flat.npy --act relu": "--data=flat.npy: has the shape (3,); it must be (N, D)",
    "net.pt --data torn.npy --act relu": "--data=torn.npy: is no array of numbers in .npy",
    "net.pt --data object.npy --act relu": "--data=object.npy: is no array of numbers in .npy",
    "net.pt --data points.csv --act relu --target z": "--target=z: no such column",
    "net.pt --data points.csv --act relu --target a": "--target=a: has 3 different values, the network 2 classes",
    "net.pt --data strange.csv --act relu": "--data=strange.csv: its column 'y' has 1 different value, the",
    "net.pt --data torn.csv --act relu": "--data=torn.csv: its column 'y' has no class in row 2, but nan (--task",
    "net.pt --data x.npy --act relu --target gone.npy": "--target=gone.npy: does not exist",
    "net.pt --data one.csv --act relu": "--data=one.csv: has 1 column (a), the network 2 inputs",
    "net.pt --data points.csv --act leaky_relu,slope=x": "--act=leaky_relu,slope=x: slope must be a finite number",
    "net.pt --data points.csv --act leaky_relu,slope=nan": "--act=leaky_relu,slope=nan: slope must be a finite",
    "net.pt --data points.csv --act leaky_relu,foo=2": "--act=leaky_relu,foo=2: leaky_relu takes slope=0.01, not",
    "net.pt --data points.csv --act elu,alpha=77": "--act=elu,alpha=77: alpha must be a number from 0 to 16",
    "net.pt --data points.csv --act celu,alpha=0": "--act=celu,alpha=0: has alpha=0",
    "net.pt --data points.csv --act gelu,approximate=x": "--act=gelu,approximate=x: approximate must be none or",
    "net.pt --data points.csv --act groupsort,foo=1": "--act=groupsort,foo=1: does not take these arguments",
    "net.pt --data points.csv --act groupsort,group_size=0": "--act=groupsort,group_size=0: group_size must be",
    "net.pt --data points.csv --act householder": "--act=householder: has parameters, which this state dict does",
    "module.pt --data points.csv --act relu": f"NET=module.pt: {PICKLED}",
    "net.pt --data points.csv --act relu --p 3": "--p=3: must be 1, 2 or inf",
    "net.pt --data points.csv --act relu --max-regions -1": "--max-regions=-1: must be a whole number",
    "net.pt --data points.csv --act relu --json found.txt": "--json=found.txt: must end in .json",
    "net.pt --data points.csv --act relu --json there.json": "--json=there.json: exists already; --force replaces",
    "net.pt --data points.csv --act relu --json no/where.json": "--json=no/where.json: lies in no folder that",
    "net.pt --data points.csv --act relu --json new.json -o no/r.csv": "-o=no/r.csv: lies in no folder that there",
    "net.pt --data points.csv --act relu -o points.csv": "-o=points.csv: is the file that is read",
    "net.pt --data points.csv --act relu -o ./points.csv --force": "-o=./points.csv: is the file that is read",
    "net.pt --data points.csv --act relu --json folder.json --force": "--json=folder.json: is no file",
    "net.pt --data points.csv --act relu --task regression --attack": "--attack: is for radii, which a regression",
    "net.pt --data points.csv --act relu --task regression --radii 1": "--radii=1: is for radii, which a",
    "net.pt2 --data points.csv --act tanh": "--act=tanh: is for a state dict; net.pt2 has its own activations",
    "net.pt --data points.csv --act relu --task regression -o r.csv": "-o=r.csv: is for radii, which a regression",
    "outputs --act relu": "--act=relu: is for a network from elsewhere, with its --data",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_does_not_fit_is_one_line(words, lipexp):
    three = {"a": [1.0, 2], "b": [1.0, 2], "c": [1.0, 2]}
    pd.DataFrame(three).to_csv("three.csv", index=False)
    pd.DataFrame({"a": [1.0, 2], "b": ["x", "y"]}).to_csv("text.csv", index=False)
    pd.DataFrame({"a": [1.0, None], "b": [1.0, 2]}).to_csv("holes.csv", index=False)
    Path("empty.csv").write_text("a,b\n")
    pd.DataFrame({"a": [1.0, 2], "b": [1.0, 2], "y": [3, 3]}).to_csv("strange.csv", index=False)
    pd.DataFrame({"a": [1.0, 2], "b": [1.0, 2], "y": ["c", None]}).to_csv("torn.csv", index=False)
    pd.DataFrame({"a": [1.0, 2]}).to_csv("one.csv", index=False)
    torch.save(nn.Linear(2, 2), "module.pt")
    np.save("x.npy", np.zeros((3, 2)))
    np.save("flat.npy", np.zeros(3))
    np.save("object.npy", np.array([[None, 1]]), allow_pickle=True)
    np.save("torn.npy", np.zeros((100, 2)))
    Path("torn.npy").write_bytes(Path("torn.npy").read_bytes()[:200])
    Path("there.json").write_text("{}")
    Path("folder.json").mkdir()
    torch.export.save(torch.export.export(three_classes(), (torch.zeros(2, 2),)), "net.pt2")
    read = Path("points.csv").read_text()
    done = certify(lipexp, words)
    assert done.code == 2
    assert done.err.startswith(f"lipexp: {REFUSED[words]}")
    assert done.err.count("\n") == 1
    assert Path("there.json").read_text() == "{}"
    assert Path("points.csv").read_text() == read
    assert not Path("new.json").exists()
