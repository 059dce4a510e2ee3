"""The plot of a run shows the logged values."""

import warnings

import matplotlib.figure
import numpy as np
import pytest

from askd_hf.hub.figure import write_run_figure

TRAINING = [
    dict(step=10, loss=3.0, teacher_weight=1.0, self_weight=0.0, ce_loss=2.0, teacher_loss=3.0),
    dict(step=20, loss=1.0, teacher_weight=0.0, self_weight=0.2, ce_loss=1.0, self_loss=0.1),
]
EVALUATION = [
    dict(step=0, eval_known_wer=150.0, eval_known_capped_wer=90.0),
    dict(step=20, eval_known_wer=12.0, eval_known_capped_wer=11.0, eval_unseen_wer=30.0),
]


@pytest.fixture
def drawn(monkeypatch) -> list[matplotlib.figure.Figure]:
    """Return the list of figures that are saved."""
    figures = []
    save = matplotlib.figure.Figure.savefig

    def note(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    return figures


def lines(axes) -> dict[str, list[list[float]]]:
    return {line.get_label(): np.stack(line.get_data()).T.tolist() for line in axes.get_lines()}


def test_weights_losses_and_error_rates_are_those_of_the_log(tmp_path, drawn):
    write_run_figure([*TRAINING, *EVALUATION], tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    weights, losses, rates = drawn[0].axes
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in weights.collections]
    assert tops == pytest.approx([0.8, 1.0, 1.0])  # stacked: labels, teacher, self
    assert lines(losses) == {
        "labels (cross-entropy)": [[10, 2.0], [20, 1.0]],
        "teacher (T²·D)": [[10, 3.0]],
        "self (T²·D)": [[20, 0.1]],
    }
    assert lines(rates) == {"known": [[0, 150.0], [20, 12.0]], "unseen": [[20, 30.0]]}


def test_a_run_with_one_logged_step_is_visible(tmp_path, drawn):
    write_run_figure([dict(step=10, teacher_weight=0.5, self_weight=0.2, ce_loss=2.0)], tmp_path / "run.png")
    weights, losses = drawn[0].axes
    bars = [(bar.get_y(), bar.get_height()) for bar in weights.patches]
    assert bars == [pytest.approx(pair) for pair in [(0, 0.3), (0.3, 0.5), (0.8, 0.2)]]
    assert weights.get_legend_handles_labels()[1] == ["labels", "teacher", "self"]
    assert [line.get_marker() for line in losses.get_lines()] == ["o"]


def test_without_evaluations_there_is_no_panel_of_error_rates(tmp_path, drawn):
    write_run_figure(TRAINING, tmp_path / "run.png")
    assert len(drawn[0].axes) == 2


def test_a_run_that_logged_nothing_yet_is_drawn(tmp_path, drawn):
    write_run_figure([], tmp_path / "run.png")
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize("rates", [(12.0, 0.0), (0.0, 0.0)])
def test_an_error_rate_of_zero_is_shown_without_a_warning(tmp_path, drawn, rates):
    evaluation = [dict(step=10 * number, eval_wer=rate) for number, rate in enumerate(rates)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_run_figure([*TRAINING, *evaluation], tmp_path / "run.png")
    low, high = drawn[0].axes[2].get_ylim()
    assert low <= 0.0 <= high and drawn[0].axes[2].get_yscale() == "linear"
