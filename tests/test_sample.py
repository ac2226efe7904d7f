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


def test_a_checkpoint_of_another_program_is_not_a_run(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert sample.main([f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "no run here (config.json is not a run's); a checkpoint of another" in said


def test_a_prompt_that_is_no_text_is_refused(tmp_path, capsys):
    assert sample.main([f"--workdir={tmp_path}", "--prompt=a\udcff"]) == 2
    assert r"--prompt='a\udcff': holds bytes that are not" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**70, -1])
def test_a_seed_that_would_be_cut_is_refused(tmp_path, capsys, seed):
    assert sample.main([f"--workdir={tmp_path}", f"--seed={seed}"]) == 2
    assert f"--seed={seed}: must be in [0, 2**31)" in capsys.readouterr().err


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
