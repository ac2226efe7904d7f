"""Pictures of masks: averages of cells, panels that name their layers."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.masked import Mask
from sparsejax.train import mask_plots, plots

PNG = b"\x89PNG\r\n\x1a\n"


def masks():
    drawn = jax.random.uniform(jax.random.key(0), (2, 200, 8, 4)) < 0.3
    return {
        "query": Mask(drawn, axes="l d h c"),
        "out": Mask(jnp.arange(24).reshape(2, 3, 4) < 6, axes="h c d"),
    }


def test_a_picture_is_the_density_of_each_cell():
    found = mask_plots.drawn(masks())
    assert found["query"].shape == (2, 96, 32)
    mask = np.asarray(masks()["query"][...]).reshape(2, 200, 32)
    cell = np.arange(200) * 96 // 200
    for at in (0, 40, 95):
        expected = mask[:, cell == at].mean(1)
        np.testing.assert_allclose(found["query"][:, at], expected, rtol=1e-6)
    whole = np.asarray(masks()["out"][...]).reshape(1, 6, 4)
    np.testing.assert_array_equal(found["out"], whole)


def test_panels_name_parameters_and_layers():
    figure = mask_plots.masks_figure(mask_plots.drawn(masks()))
    titles = [axes.get_title().partition("\n")[0] for axes in figure.axes]
    assert titles == ["out", "query 0", "query 1", ""]
    assert mask_plots.masks_figure({}) is None


def test_changes_are_drawn_for_what_the_table_has(tmp_path):
    table = [
        {"step": s, "masked/flip_rate": 0.1 / s, "masked/dead_units": 0.0}
        for s in (1, 2, 3)
    ]
    figure = mask_plots.changes_figure(table)
    (axes,) = figure.axes
    labels = [line.get_label() for line in axes.lines]
    assert labels == ["weights that flip in a step", "outputs without a live input"]
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [0.1, 0.05, 0.1 / 3])
    assert mask_plots.changes_figure([{"step": 1, "loss": 1.0}]) is None


def test_further_figures_are_written_beside_the_others(tmp_path):
    more = {
        "masks": lambda _: mask_plots.masks_figure(mask_plots.drawn(masks())),
        "mask_changes": mask_plots.changes_figure,
    }
    (path,) = plots.write_plots(tmp_path, more=more)
    assert path.name == "masks.png"
    assert path.read_bytes().startswith(PNG)
