"""Pictures of experts show the numbers that they were given."""

import numpy as np
from matplotlib.figure import Figure

from sparsejax.train.expert_plots import draw_co_activation, draw_specialisation


def test_co_activation_leaves_out_an_expert_with_itself():
    shares = np.array([[1, 0.25], [0.75, 1]])
    axes = draw_co_activation(Figure().subplots(), shares)
    drawn = axes.images[0].get_array()
    assert np.ma.is_masked(drawn[0, 0])
    assert drawn[0, 1] == 0.25
    assert shares[0, 0] == 1


def test_specialisation_has_a_row_for_each_label():
    shares = np.array([[0.5, 0.5], [1, 0], [0.1, 0.9]])
    axes = draw_specialisation(Figure().subplots(), shares, ["the", "of", "cat"])
    np.testing.assert_array_equal(axes.images[0].get_array(), shares)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["the", "of", "cat"]
