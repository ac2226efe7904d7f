import json

import pytest

from sparsejax import sample
from sparsejax.config import to_dict
from tests.train import toy


def test_a_folder_without_a_run_is_named(tmp_path, capsys):
    assert sample.main([f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: --workdir={tmp_path}: no run here (config.json is missing)\n"
    )


@pytest.fixture
def begun(tmp_path):
    """A run that has saved nothing yet."""
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} says little.")
    data = {"files": [str(tmp_path / "*.txt")], "cache_dir": str(tmp_path / "cache")}
    text = json.dumps({"config": to_dict(toy.toy(data=data))})
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_a_run_that_has_saved_nothing_is_named(begun, capsys):
    assert sample.main([f"--workdir={begun}"]) == 2
    assert "no checkpoint yet; train first" in capsys.readouterr().err
