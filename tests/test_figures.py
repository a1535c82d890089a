"""The pictures show what they say, and claims are judged on the runs that they are drawn from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SIZES, choice_of, options
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from sklearn.metrics import confusion_matrix

import lipexp as package
from lipexp import figures
from lipexp.activations import GroupSort
from lipexp.evaluate import Evaluator
from lipexp.figures import absolute_value, attenuation, claims, groupsort, margins
from lipexp.figures.experiments import evaluated
from lipexp.figures.run import run_figure
from lipexp.figures.story import Story
from lipexp.figures.style import class_colour, panels
from lipexp.loop import fit
from lipexp.members import build, stack
from lipexp.runs import RunFolder

NO_SIZES = ("dataset.n_train=null", "dataset.n_val=0.2", "dataset.n_test=0.2")  # of a file: all its rows


@pytest.fixture
def drawn(compose):
    """drawn("act=relu") -> (figure, evaluation) of a small run."""

    def draw(*overrides):
        member = build(compose("experiment=debug", "device=cpu", "max_regions=0", *overrides))
        runs = stack([member])
        (found,) = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
        return run_figure(found, member), found

    return draw


def test_a_classifier_is_drawn_with_both_classes_and_labelled_levels(drawn):
    figure, found = drawn()
    (ax,) = figure.axes
    columns = pd.DataFrame(found.gradients).query("split == 'test'")
    points = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 1])
    assert sorted(map(tuple, points)) == sorted(map(tuple, columns[["x0", "x1"]].to_numpy()))
    assert len(ax.texts) >= 4
    assert "0" in [text.get_text() for text in ax.texts]
    assert f"test accuracy {found.scores['test']['accuracy']:.4g}" in figure.get_suptitle()
    assert "‖∇f‖₂: measured" in figure.get_suptitle()
    assert ax.get_aspect() == 1


def test_a_constant_network_is_drawn_without_complaint(drawn):
    figure, _ = drawn("lipschitz=1e-30", "steps=0")
    assert figure.axes


def test_a_fitted_curve_is_drawn_with_target_and_slope(drawn):
    figure, _ = drawn("dataset=absolute_value", "lipschitz=2", "constraint=linf", "constraint.p=inf")
    upper, lower = figure.axes
    target, f = (line.get_xydata() for line in upper.get_lines())
    assert np.allclose(target[:, 1], np.abs(target[:, 0]))
    slope = lower.get_lines()[0].get_xydata()
    between = np.diff(f[:, 1]) / np.diff(f[:, 0])  # the slope drawn is the slope of the curve drawn
    assert np.median(np.abs(between - slope[:-1, 1])) < 1e-9
    assert {line.get_ydata()[0] for line in lower.get_lines()[1:]} == {-2.0, 2.0}
    assert "‖∇f‖₁" in figure.get_suptitle()


def test_more_inputs_are_drawn_as_distributions(drawn):
    figure, found = drawn("dataset=digits_parity", "dataset.n_train=100", "dataset.n_test=60")
    f_ax, gradient_ax, radius_ax = figure.axes
    assert (
        sum(bar.get_height() for bar in f_ax.patches) == sum(bar.get_height() for bar in gradient_ax.patches) == 60
    )
    marked = {line.get_label(): line.get_xdata()[0] for line in gradient_ax.get_lines()}
    assert marked == {"measured": found.measured.value, "certified": found.certificate.value, "L": 1.0}
    columns, curves = found.robustness.of("test"), radius_ax.get_lines()
    assert [line.get_label() for line in curves] == ["local constants", "one constant"]
    for line, name in zip(curves, ("radius_local", "radius"), strict=True):
        radius, share = line.get_data()
        for i in (1, len(radius) // 2, len(radius) - 1):
            held = (columns["correct"] == 1) & (columns[name] >= radius[i])
            assert share[i] == pytest.approx(held.mean())


@pytest.fixture
def four_classes(tmp_path):
    """The overrides of a dataset of four classes in the plane, one around each corner of a square."""
    rng = np.random.default_rng(0)
    y = np.arange(400) % 4
    np.savez(tmp_path / "four.npz", x=np.stack([y % 2, y // 2], axis=1) * 2 + rng.normal(size=(400, 2)) / 3, y=y)
    return f"dataset=npz dataset.path={tmp_path / 'four.npz'} loss=multi_margin lipschitz=3".split()


def test_several_classes_in_the_plane_are_drawn_as_the_regions_in_which_the_network_decides_for_them(
    drawn, four_classes
):
    figure, found = drawn(*four_classes, *SIZES)
    (ax,) = figure.axes
    (image,) = ax.images
    rows, columns, _ = image.get_array().shape
    left, right, low, high = image.get_extent()
    x, y = np.meshgrid(np.linspace(left, right, columns), np.linspace(low, high, rows))
    network = found.network.double
    f = network(torch.from_numpy(np.stack([x, y], axis=-1).reshape(1, -1, 2)))[0].reshape(rows, columns, 4).numpy()
    colours = np.array([to_rgb(class_colour(c)) for c in range(4)])
    assert np.array_equal(image.get_array(), colours[f.argmax(axis=2)])
    top = np.sort(f, axis=2)
    shown = {text.get_text() for text in ax.texts if text.get_visible()}
    assert shown
    assert all(0 < float(text) < (top[..., 3] - top[..., 2]).max() for text in shown)
    dots = [c for c in ax.collections if str(c.get_label()).startswith("class ")]
    test = pd.DataFrame(found.gradients).query("split == 'test'")
    for c, drawn_points in enumerate(dots):
        own = test[test["y"] == c][["x0", "x1"]].to_numpy()
        assert sorted(map(tuple, drawn_points.get_offsets())) == sorted(map(tuple, own))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["class 0", "class 1", "class 2", "class 3", "margin of the\nlargest output"]


def test_more_classes_than_colours_share_the_last(drawn, tmp_path):
    y = np.arange(480) % 12
    x = np.stack([np.cos(y), np.sin(y)], axis=1) + np.random.default_rng(0).normal(size=(480, 2)) / 10
    np.savez(tmp_path / "twelve.npz", x=x, y=y)
    figure, _ = drawn("dataset=npz", f"dataset.path={tmp_path / 'twelve.npz'}", "loss=multi_margin", *SIZES)
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names[8:] == ["class 8", "3 others", "margin of the\nlargest output"]
    assert len({class_colour(c) for c in range(12)}) == 10


def test_several_classes_are_drawn_with_margins_and_confusion(drawn):
    figure, found = drawn("dataset=wine", "dataset.n_train=100", "dataset.n_test=30", "dataset.n_val=30")
    margin_ax, gradient_ax, _, confusion_ax = figure.axes
    test = pd.DataFrame(found.gradients).query("split == 'test'")
    f = test[["f0", "f1", "f2"]].to_numpy()
    counts = confusion_matrix(test["y"], f.argmax(axis=1), labels=range(3))
    shown = {
        (round(t.get_position()[1]), round(t.get_position()[0])): int(t.get_text()) for t in confusion_ax.texts
    }
    assert shown == {(i, j): counts[i, j] for i in range(3) for j in range(3) if counts[i, j]}
    assert [label.get_text() for label in confusion_ax.get_yticklabels()] == ["class_0", "class_1", "class_2"]
    right, wrong = (int(text.get_text().split()[0]) for text in margin_ax.get_legend().get_texts())
    assert (right, right + wrong) == (np.trace(counts), 30)
    below_zero = sum(bar.get_height() for bar in margin_ax.patches if bar.get_x() + bar.get_width() < 1e-9)
    assert below_zero == wrong > 0
    assert sum(bar.get_height() for bar in gradient_ax.patches) == 30
    assert gradient_ax.get_xlabel() == "‖J‖₂"


def test_several_outputs_of_one_input_are_drawn_as_curves_with_their_targets_and_slopes(drawn, tmp_path):
    x = np.linspace(-1, 1, 200)[:, None] + 0.001
    np.savez(tmp_path / "two.npz", x=x, y=np.hstack([np.abs(x), x / 2]))
    figure, found = drawn("dataset=npz", f"dataset.path={tmp_path / 'two.npz'}", "loss=mse", *SIZES)
    upper, lower = figure.axes
    test = pd.DataFrame(found.gradients).query("split == 'test'")
    for c in range(2):
        targets, f = (line.get_xydata() for line in upper.get_lines()[2 * c : 2 * c + 2])
        assert np.array_equal(targets, test[["x0", f"y{c}"]].to_numpy())
        slope = lower.get_lines()[c].get_ydata()
        assert np.median(np.abs(np.diff(f[:, 1]) / np.diff(f[:, 0]) - slope[:-1])) < 1e-9


TABLE = f"dataset=table dataset.path={Path(__file__).with_name('table.csv')}".split()


def test_what_a_table_calls_its_columns_and_classes_stands_in_the_picture(drawn):
    figure, _ = drawn(*TABLE, "dataset.target=ill", "dataset.columns=[age,smoker]", *NO_SIZES)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("age, standardised", "smoker")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["ill=no", "ill=yes", "f"]


def test_the_slopes_of_monotone_features_are_drawn_in_their_directions(drawn):
    chosen = ("dataset.target=pressure", "dataset.columns=[age,smoker,ill]", "loss=mse")
    figure, found = drawn(*TABLE, *chosen, "model.monotone={age: 1, smoker: -1}", *NO_SIZES)
    assert "monotone: f rises with age, falls with smoker: proven" in " ".join(figure.get_suptitle().split())
    ax = figure.axes[-1]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["age ↑", "smoker ↓"]
    test = pd.DataFrame(found.gradients).query("split == 'test'")
    x = torch.from_numpy(test[[f"x{i}" for i in range(found.network.n_inputs)]].to_numpy(copy=True))
    for k, sign in enumerate((1, -1)):
        moved = x.clone()
        moved[:, k] += 1e-7
        f, after = (found.network.double(points[None])[0, :, 0].numpy() for points in (x, moved))
        slopes = sign * (after - f) / 1e-7
        ends = np.concatenate([ax.get_lines()[i].get_xdata() for i in range(6 * k, 6 * k + 6)])
        assert [ends.min(), ends.max()] == pytest.approx([slopes.min(), slopes.max()], abs=1e-5)
        assert ends.min() >= 0


DRAWN = {
    **{option: choice_of("dataset", option) for option in options("dataset")},
    "cones in 1-D": ("dataset=cones", "dataset.n_inputs=1"),
    "one cone": ("dataset=cones", "dataset.n_cones=1"),
    "cones in 5-D": ("dataset=cones", "dataset.n_inputs=5"),
    "without a constraint": ("dataset=digits_parity", "constraint=none", "loss=bce", "act=relu"),
    "nearly constant": ("dataset=digits_parity", "lipschitz=1e-30", "steps=0"),
    "nearly constant in 1-D": ("dataset=absolute_value", "lipschitz=1e-30", "steps=0"),
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_run_has_a_picture_in_which_no_text_is_cut_or_covered(drawn, name, monkeypatch):
    figure, _ = drawn(*DRAWN[name], *SIZES)
    drawn_texts: dict[Text, None] = {}  # not all that it holds: ticks beyond the ends of an axis are not drawn
    draw = Text.draw

    def noted(text: Text, renderer: object) -> None:
        drawn_texts[text] = None
        draw(text, renderer)

    monkeypatch.setattr(Text, "draw", noted)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    levels = {text for ax in figure.axes for text in ax.texts}
    texts = [text for text in drawn_texts if text.get_visible() and text.get_text().strip() and text not in levels]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(boxes) > 10
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            assert not box.overlaps(other)


# The verb --------------------------------------------------------------------------------------------------------

OUTPUT = Path("outputs/figures")
RUN = OUTPUT / "runs/debug/0"


@pytest.fixture
def story(monkeypatch):
    """The figure `short` of one short run, whose claim asks for an accuracy of at least story["least"]."""
    wanted = {"least": 0.0}

    def draw(runs):
        (run,) = runs["debug"]["run"]
        figure, (ax,) = panels(2, 2)
        ax.plot(evaluated(run, np.zeros((1, 2)))[0], "o")
        return figure

    def judge(runs):
        monkeypatch.setitem(claims.THRESHOLDS, "accuracy", claims.at_least(wanted["least"]))
        return [claims.verdict("accuracy", runs["debug"]["test.accuracy"].min())]

    monkeypatch.setitem(figures.FIGURES, "short", "groupsort")  # the module that has it
    monkeypatch.setitem(groupsort.STORIES, "short", Story(("debug",), draw, judge))
    return wanted


def test_a_figure_trains_what_it_needs_once(lipexp, story):
    refused = lipexp("figures", "margin")
    assert (refused.code, OUTPUT.exists()) == (2, False)
    assert "did you mean margins" in refused.err
    result = lipexp("figures", "groupsort", "short")
    assert (result.code, result.err) == (0, "")
    pictures = {f"{name}.{kind}" for name in ("groupsort", "short") for kind in ("png", "svg")}
    assert {path.name for path in OUTPUT.iterdir()} == {"claims.json", "runs", *pictures}
    trained = (RUN / "metrics.json").stat().st_mtime_ns
    first = (OUTPUT / "claims.json").read_text()
    assert {entry["figure"] for entry in json.loads(first)} == {"groupsort", "short"}
    # The claims of a figure that is not drawn again stay, and so does a run that is there.
    assert lipexp("figures", "short").code == 0
    assert (RUN / "metrics.json").stat().st_mtime_ns == trained
    assert (OUTPUT / "claims.json").read_text() == first
    (RUN / "metrics.json").unlink()  # half-written: trained again, to the same numbers
    assert lipexp("figures", "short").code == 0
    assert (RUN / "metrics.json").stat().st_mtime_ns > trained
    assert (OUTPUT / "claims.json").read_text() == first
    assert lipexp("figures", "short", "--fresh").code == 0
    assert (OUTPUT / "claims.json").read_text() == first
    (earlier,) = (OUTPUT / "runs").glob("debug-until-*")
    assert (earlier / "0" / "metrics.json").is_file()


def test_a_claim_that_does_not_hold_is_said(lipexp, story):
    story["least"] = 1.01
    result = lipexp("figures", "short")
    assert result.code == 1
    assert "DOES NOT HOLD" in result.out
    assert "1 claims do not hold" in result.err
    bound, accuracy = json.loads((OUTPUT / "claims.json").read_text())
    assert (bound["claim"], bound["holds"]) == (claims.BOUND, True)
    assert (accuracy["claim"], accuracy["holds"], accuracy["threshold"]) == ("accuracy", False, "≥ 1.01")


def test_a_run_that_cannot_be_read_is_named_and_not_drawn(lipexp, story):
    lipexp("figures", "short")
    (OUTPUT / "short.png").unlink()
    for name, content in {"model.pt": b"half", "metrics.json": b"{}", ".hydra/config.yaml": b"{"}.items():
        whole = (RUN / name).read_bytes()
        (RUN / name).write_bytes(content)
        result = lipexp("figures", "short")
        assert (result.code != 0, len(result.err.splitlines()) <= 2, (OUTPUT / "short.png").exists()) == (1, 1, 0)
        assert str(RUN) in result.err
        (RUN / name).write_bytes(whole)


# Claims ----------------------------------------------------------------------------------------------------------


def test_a_threshold_holds_at_its_ends_and_not_for_what_is_no_number():
    threshold = claims.Threshold(0.85, 0.94)
    assert [threshold.holds(value) for value in (0.8499, 0.85, 0.94, 0.9401)] == [False, True, True, False]
    one = claims.verdict("3 |x|, GroupSort, linf: test MSE, largest", math.nan)
    assert (one.measured, one.holds) == (None, False)


def test_the_bound_is_compared_exactly():
    good, more = (0.5, 1.0, 1.0), np.nextafter(1, 2)
    for run, holds in {(1, 1, 1): True, (more, 1, 1): False, (0.5, more, 1): False, (3, 4, None): True}.items():
        keys = ("lipschitz.measured", "lipschitz.certified", "lipschitz.target")
        runs = [pd.DataFrame([one], columns=keys) for one in (good, run)]
        assert claims.bound_verdict(runs).holds is holds


def test_what_claims_compare_is_measured_on_the_network(trained_run):
    folder = trained_run("dataset=absolute_value")
    x = torch.from_numpy(absolute_value.between(absolute_value.POINTS)).requires_grad_()
    (slope,) = torch.autograd.grad(package.load(folder).network.double()(x).sum(), x)
    expected = float(slope.max() - slope.min()) / 2
    assert absolute_value.half_range(RunFolder(folder)) == pytest.approx(expected, rel=1e-12)
    folder = RunFolder(trained_run("steps=0", "model.depth=3"))
    norms = attenuation.at_hidden_layers(pd.DataFrame({"run": [folder]}))
    assert norms == pytest.approx(np.ones((1, 3)), abs=1e-4)  # GroupSort, orthogonal weights; without the first
    points = package.load(trained_run()).table("gradients").query("split == 'train'")
    first, second = (points[points["y"] == y][["x0", "x1"]].to_numpy() for y in (0, 1))
    smallest = np.linalg.norm(first[:, None] - second[None], axis=-1).min()
    assert margins.half_distance(RunFolder(trained_run())) == pytest.approx(smallest / 2)


def test_the_groups_of_the_groupsort_figure_are_sorted():
    x = np.array(groupsort.VECTOR)
    for n_groups in groupsort.GROUPS:
        expected = np.sort(x.reshape(n_groups, -1), axis=1).ravel()
        assert np.array_equal(groupsort.sorted_in(n_groups, x), expected)
    assert GroupSort(n_groups=groupsort.GROUPS[0]).groups(groupsort.D).shape == (4, 2)


@pytest.mark.slow
def test_every_claim_of_every_figure_holds(lipexp):
    result = lipexp("figures")
    assert result.code == 0, result.out + result.err
    for name in figures.FIGURES.keys() - figures.LONG:
        assert {path.suffix for path in OUTPUT.glob(f"{name}.*")} == {".png", ".svg"}
    claims_made = {entry["claim"] for entry in json.loads((OUTPUT / "claims.json").read_text())}
    assert claims_made == {claim for claim in claims.THRESHOLDS if not claim.startswith("9 ")}  # of compare
