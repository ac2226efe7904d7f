"""Pictures of experts show the numbers that they were given."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsejax.train.expert_plots import (
    draw_co_activation,
    draw_specialisation,
    figures,
)


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


def test_a_label_with_dollars_is_drawn_as_it_is():
    figure = Figure()
    draw_specialisation(figure.subplots(), np.eye(2), ["'$$'", "'$x_$'"])
    FigureCanvasAgg(figure).draw()


FOUND = {
    "co_activation": np.eye(4)[None].repeat(2, axis=0),
    "by_token": np.full((2, 3, 4), 0.25),
    "by_position": np.full((2, 5, 4), 0.25),
    "tokens": ["'a'", "'b'", "'c'"],
    "positions": ["0", "1", "from 2", "from 4", "from 8"],
    "saturation": {5: np.array([0.5, 0.6]), 10: np.ones(2)},
}


def test_a_run_with_experts_draws_what_they_are_for():
    table = [{"step": 5}, {"step": 10, "moe/churn": [0.25, 0.75]}]
    drawn = {name: make(table) for name, make in figures(FOUND).items()}
    above, below = drawn["expert_changes"].axes
    assert [line.get_ydata().tolist() for line in above.lines] == [[0.25], [0.75]]
    assert [line.get_ydata().tolist() for line in below.lines] == [[0.5, 1], [0.6, 1]]
    panels = drawn["token_experts"].axes
    assert [x.get_title() for x in panels[:2]] == ["MoE layer 0", "MoE layer 1"]
    assert [x.get_text() for x in panels[0].get_yticklabels()] == FOUND["tokens"]
    places = drawn["position_experts"].axes[1]
    assert [x.get_text() for x in places.get_yticklabels()] == FOUND["positions"]
    assert drawn["co_activation"].axes[0].images


def test_there_is_nothing_to_draw_without_experts_or_a_second_evaluation():
    assert figures({}) == {}
    assert figures(FOUND)["expert_changes"]([{"step": 5}]) is None
