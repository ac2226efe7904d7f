"""Tables of hashes: drawn, balanced, clustered, and read from files."""

import numpy as np
import pytest

from sparsejax.moe import TABLES
from sparsejax.moe.tables import balanced, clustered, dispersed, random, read_table

EXPERTS = 8


def test_a_random_table_gives_every_expert_about_as_many_ids():
    counts = np.bincount(random(4096, EXPERTS), minlength=EXPERTS)
    assert abs(counts - 512).max() < 5 * np.sqrt(512)
    assert (random(4096, EXPERTS, seed=1) != random(4096, EXPERTS)).mean() > 0.8


def test_a_balanced_table_is_balanced():
    counts = 1_000_000 // np.arange(1, 2001)  # as words are
    load = np.bincount(balanced(counts, EXPERTS), weights=counts)
    assert load.max() <= load.mean() + counts.max()
    rest = counts[20:]
    load = np.bincount(balanced(rest, EXPERTS), weights=rest)
    assert load.max() / load.mean() < 1.001
    drawn = np.bincount(random(len(rest), EXPERTS), weights=rest)
    assert drawn.max() / drawn.mean() > 1.01


def test_clusters_share_an_expert_and_dispersed_ones_share_all():
    """Eight far clusters of forty ids each."""
    generator = np.random.default_rng(0)
    centers = 100 * np.eye(EXPERTS)
    of = np.repeat(np.arange(EXPERTS), 40)
    points = centers[of] + generator.normal(size=(320, EXPERTS))
    table = clustered(points, EXPERTS, seed=1)
    assert all(len(set(table[of == c])) == 1 for c in range(EXPERTS))
    spread = dispersed(points, EXPERTS, seed=1)
    for cluster in set(table):
        counts = np.bincount(spread[table == cluster], minlength=EXPERTS)
        assert counts.max() - counts.min() <= 1


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = str(tmp_path / "table.npy")
    with pytest.raises(ValueError, match="no such file; write it with"):
        read_table(path, 4)
    for wrong in (np.zeros((2, 2), int), np.array([0.5]), np.array([0, 4])):
        np.save(path, wrong)
        with pytest.raises(ValueError, match="list of integers from 0 to 3"):
            read_table(path, 4)
    np.save(path, TABLES["random"](10, 4))
    assert len(read_table(path, 4)) == 10
