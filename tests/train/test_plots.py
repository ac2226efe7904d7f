"""Figures say what is in the table, label their axes, and leave no trace elsewhere."""

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsejax.train import plots
from sparsejax.train.metrics import MetricsLog

PNG = b"\x89PNG\r\n\x1a\n"

LOAD = [[4.0, 2.0, 1.0, 1.0], [8.0, 0.0, 0.0, 0.0]]


def table(steps=4):
    """Lines of a run, evaluated at every second step."""
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "tokens": 100 * step,
            "loss": 4.0 - step / 2,
            "moe/load": LOAD,
            "masked/density": 0.5,
            "masked/density/stacks/0/up": [0.25, 0.75],
            "masked/density/head": 1 / step,
            "memory/usage": [0.1 * step, 0.2],
        }
        if step % 2 == 0:
            row |= {"eval/loss": 4.5 - step / 2, "eval/bits_per_byte": 1 + 1 / step}
        rows.append(row)
    return rows


@pytest.fixture
def axes():
    with plots.style():
        return Figure().subplots()


def lines(axes):
    return [
        (np.asarray(x).tolist(), np.asarray(y).tolist())
        for x, y in (line.get_data() for line in axes.lines)
    ]


TABLES = [
    plots.loss_curves,
    plots.eval_curve,
    plots.expert_load,
    plots.mask_density,
    plots.memory_usage,
]


@pytest.mark.parametrize("draw", TABLES)
@pytest.mark.parametrize("steps", [2, 50])
def test_every_figure_returns_its_labelled_axes(axes, draw, steps):
    assert draw(axes, table(steps)) is axes
    assert axes.get_xlabel() in ("training tokens", "step")
    assert axes.get_ylabel()
    axes.figure.canvas.draw()


def test_loss_is_drawn_over_tokens_beside_the_held_out_loss(axes):
    plots.loss_curves(axes, table())
    raw, mean, held_out = lines(axes)
    assert raw == ([100, 200, 300, 400], [3.5, 3.0, 2.5, 2.0])
    assert mean == raw  # too short a run to smooth
    assert held_out == ([200, 400], [3.5, 2.5])


def test_a_running_mean_is_centred_and_keeps_a_straight_line(axes):
    plots.loss_curves(axes, table(400))
    raw, mean = lines(axes)[:2]
    np.testing.assert_allclose(mean[1], raw[1])
    bumpy = [row | {"loss": (-1.0) ** row["step"]} for row in table(400)]
    plots.loss_curves(axes, bumpy)
    assert np.abs(axes.lines[4].get_ydata()[4:-4]).max() < 0.2


def test_the_best_evaluation_is_named(axes):
    plots.eval_curve(axes, table())
    assert [text.get_text() for text in axes.texts] == ["best 1.250"]


def test_an_evaluation_that_is_not_finite_is_no_error(axes):
    rows = [row | {"eval/bits_per_byte": float("nan")} for row in table()]
    plots.eval_curve(axes, rows)


@pytest.mark.parametrize(("layer", "share"), [(0, [2, 1, 0.5, 0.5]), (1, [4, 0, 0, 0])])
def test_load_is_relative_to_the_uniform_share(axes, layer, share):
    plots.expert_load(axes, table(), layer=layer)
    drawn = axes.collections[0].get_array().reshape(4, 4)
    np.testing.assert_allclose(drawn.filled(0)[:, 0], share)


def test_an_expert_without_tokens_is_black(axes):
    plots.expert_load(axes, table(), layer=1)
    mesh = axes.collections[0]
    mesh.update_scalarmappable()
    colors = mesh.get_facecolor().reshape(4, 4, 4)
    np.testing.assert_array_equal(colors[1:, 0, :3], 0)
    assert colors[0, 0, 0] > 0


def test_a_long_run_is_thinned_to_what_can_be_seen(axes):
    plots.expert_load(axes, table(2 * plots.COLUMNS + 1))
    assert axes.collections[0].get_array().size <= 4 * plots.COLUMNS


def test_density_is_drawn_for_each_layer_and_their_mean(axes):
    plots.mask_density(axes, table())
    drawn = [values for _, values in lines(axes)]
    assert [0.25] * 4 in drawn
    assert [0.75] * 4 in drawn
    assert [0.5] * 4 in drawn
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["stacks/0/up", "head"]


def test_too_many_paths_say_so(axes):
    many = {f"masked/density/{i}": 0.5 for i in range(plots.MANY + 3)}
    plots.mask_density(axes, [row | many for row in table()])
    assert axes.get_legend().get_title().get_text() == "first 12 of 17"


def test_memory_usage_has_a_line_for_each_layer(axes):
    plots.memory_usage(axes, table())
    assert [values for _, values in lines(axes)][1] == [0.2] * 4
    assert len(axes.get_legend().get_texts()) == 2


def test_a_pattern_names_its_density(axes):
    levels = np.array([[1, 0], [2, 1]])
    plots.attention_pattern(axes, levels, name="layer 3")
    assert axes.get_title() == "layer 3\n75% of blocks live"
    np.testing.assert_array_equal(axes.images[0].get_array(), levels)


def write(workdir, rows):
    with MetricsLog(workdir) as log:
        for row in rows:
            log.write(row["step"], {k: v for k, v in row.items() if k != "step"})


def global_state():
    return str(mpl.rcParams), mpl.get_backend(auto_select=False)


def test_every_figure_with_data_is_written(tmp_path):
    write(tmp_path, table())
    before = global_state()
    paths = plots.write_plots(tmp_path, {"layer 0": np.eye(4, dtype=int)})
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "plots/loss.png",
        "plots/expert_load.png",
        "plots/mask_density.png",
        "plots/memory_usage.png",
        "plots/attention.png",
    ]
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    assert global_state() == before


def test_only_figures_with_data_are_written(tmp_path):
    write(tmp_path, [{"step": 1, "tokens": 5, "loss": 1.0}])
    assert [path.name for path in plots.write_plots(tmp_path)] == ["loss.png"]
    assert plots.write_plots(tmp_path / "nothing") == []


def test_many_layers_and_patterns_are_thinned_evenly(tmp_path):
    rows = [{"step": s, "tokens": s, "moe/load": [[1, 3]] * 40} for s in (1, 2)]
    write(tmp_path, rows)
    patterns = {f"layer {i}": np.ones((2, 2), int) for i in range(30)}
    names = [path.name for path in plots.write_plots(tmp_path, patterns)]
    assert names == ["expert_load.png", "attention.png"]
    chosen = plots.evenly(40)
    assert len(chosen) == plots.MANY
    assert (chosen[0], chosen[-1]) == (0, 39)
