"""In as a run that trains on, out again, and text from either."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from sparsejax import sample, tree
from sparsejax.config import ConfigError
from sparsejax.data import ByteTokenizer
from sparsejax.data.tokenizer_file import files_of
from sparsejax.interop import load_model, open_source, run
from sparsejax.interop.__main__ import main
from sparsejax.interop.chat import asked
from sparsejax.interop.files import read
from sparsejax.interop.folder import SINGLE
from sparsejax.interop.pretrained import tokenizer_of
from sparsejax.interop.run import begin
from sparsejax.train.checkpoint import Checkpoints
from sparsejax.train.loop import Trainer
from sparsejax.train.trained import alone, load
from sparsejax.train.trained import config_of as config_of_run
from tests.interop.checkpoints import config_of, tensors_of, write_folder

CONFIG = config_of("mistral", vocab_size=258)

EXPERIMENT = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{
        "data": {{
            "files": ("{texts}/*.txt",), "cache_dir": "{texts}/cache",
            "seq_len": 16, "batch_size": 2, "vocab_size": 258,
            "tokenizer": "file", "tokenizer_file": "{out}/tokenizer.json",
        }},
        "model": {{
            "depth": 2, "width": 16, "heads": 4, "kv_heads": 2,
            "embedding_scale": 1.0, "norm_epsilon": {epsilon}, "context_length": 64,
            "attention": {{
                "pattern": "sliding_window", "arguments": {{"window": 5}},
                "block_q": 8, "block_kv": 8, "rope_theta": 100.0,
                "qk_norm": False, "norm_epsilon": 1e-4,
            }},
            "ffn": {{"hidden": 24}},
        }},
        "mesh": {mesh},
        "optim": {{"name": "adamw", "learning_rate": 1e-4}},
        "train": {{"steps": 2}},
    }})
"""


@pytest.fixture
def folder(tmp_path):
    tensors = tensors_of("mistral", CONFIG)
    path = write_folder(tmp_path / "hf", CONFIG, tensors)
    for name, text in files_of(ByteTokenizer()).items():
        (path / name).write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def experiment(tmp_path):
    """A config file of the checkpoint's model, with a field changed."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(4):
        (texts / f"{number}.txt").write_text(f"Text {number} says little. " * 9)

    def write(**changes):
        given = {"texts": texts, "out": tmp_path / "run", "epsilon": 1e-4}
        given |= {"mesh": {}} | changes
        (tmp_path / "experiment.py").write_text(EXPERIMENT.format(**given))
        return tmp_path / "experiment.py"

    return write


def test_a_checkpoint_becomes_a_run_and_a_checkpoint_again(
    folder, experiment, tmp_path, capsys
):
    out = tmp_path / "run"
    command = [f"--source={folder}", f"--out={out}", f"--config={experiment()}"]
    assert main(["import", *command]) == 0, capsys.readouterr().err
    model, tokenizer = load(out)
    jax.tree.map(
        np.testing.assert_array_equal,
        tree.leaves(nnx.state(model)),
        tree.leaves(nnx.state(load_model(open_source(folder)))),
    )
    assert tokenizer.decode(tokenizer.encode("né")) == "né"
    command = [f"--workdir={out}", "--family=mistral", f"--out={tmp_path / 'back'}"]
    assert main(["export", *command]) == 0, capsys.readouterr().err
    first, last = (read(x / SINGLE) for x in (folder, tmp_path / "back"))
    assert {k: v.tobytes() for k, v in first.items()} == {
        k: v.tobytes() for k, v in last.items()
    }
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["bos_token_id"] == 256
    before, after = (
        (x / "tokenizer.json").read_text() for x in (folder, tmp_path / "back")
    )
    assert before == after


@pytest.mark.parametrize(
    ("mesh", "devices"),
    [
        ({"fsdp": 8}, 8),
        ({"data": 1, "tensor": 2, "fsdp": -1}, 8),
        ({"data": 2, "fsdp": 16}, 1),
    ],
)
def test_an_import_over_the_mesh_of_the_config_is_that_of_one_device(
    folder, experiment, tmp_path, monkeypatch, mesh, devices
):
    out, used = tmp_path / "run", []
    write = run.write_start

    def watched(*given, mesh, **how):
        used.append(mesh.size)
        write(*given, mesh=mesh, **how)

    monkeypatch.setattr(run, "write_start", watched)
    for sizes in ({}, mesh):
        begin(open_source(folder), out, config=experiment(mesh=sizes))
        out.rename(tmp_path / f"{len(used)}")
    assert used == [1, devices]
    tokenizer = str(tmp_path / "1" / "tokenizer.json")
    config, states = config_of_run(tmp_path / "1"), []
    config = replace(config, data=replace(config.data, tokenizer_file=tokenizer))
    for number in (1, 2):
        with jax.set_mesh(alone()):
            trainer = Trainer(config, alone())
            trainer.data.train.close()
            folder = tmp_path / f"{number}" / "checkpoints"
            saved = Checkpoints(folder, keep=1, read_only=True)
            states.append(saved.restore(trainer.abstract).state)
            saved.close()
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 1e-6}, r"not the model of the checkpoint: model\.norm_epsilon"),
        ({"out": "elsewhere"}, "must be 'file' and .*, where the checkpoint's"),
        ({"texts": "nowhere"}, "nowhere"),
    ],
)
def test_an_import_that_fails_leaves_nothing(
    folder, experiment, tmp_path, changes, message
):
    config = experiment(**changes)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        begin(open_source(folder), tmp_path / "run", config=config)
    # Python may keep what it has compiled of the config file.
    assert set(tmp_path.iterdir()) - {tmp_path / "__pycache__"} == before


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 200}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"it has 258 ids, the model 200"):
        begin(open_source(folder), tmp_path / "run")


def test_a_checkpoint_without_a_tokenizer_is_named(folder, tmp_path, capsys):
    (folder / "tokenizer.json").unlink()
    assert main(["import", f"--source={folder}", f"--out={tmp_path / 'run'}"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_inspect_says_what_a_checkpoint_is(folder, capsys):
    assert main(["inspect", f"--source={folder}"]) == 0
    said = capsys.readouterr().out
    assert "MistralForCausalLM" in said
    assert "model.attention.arguments.window" in said


def test_text_is_drawn_from_several_prompts_at_once(folder, capsys):
    command = [f"--checkpoint={folder}", "--tokens=3", "--temperature=0"]
    assert sample.main([*command, "--prompt=ab", "--prompt=abcd\\n"]) == 0
    both = capsys.readouterr().out
    assert both.startswith("ab")
    assert "\n---\nabcd\n" in both
    assert sample.main([*command, "--prompt=ab"]) == 0
    alone = capsys.readouterr().out
    assert both.startswith(alone.rstrip("\n"))


@pytest.mark.parametrize("name", ["no_such_package", "no_such.package", ".package"])
def test_a_package_that_is_not_there_is_named(capsys, name):
    assert main(["inspect", f"--source=package:{name}"]) == 2
    said = capsys.readouterr().err
    remedy = f"pip install --no-deps {name.replace('_', '-')}"
    assert f"not installed; {remedy}" in said


TEMPLATE = """{{ bos_token }}
{% for message in messages %}
    {% if message['content'] == 'no' %}{{ raise_exception('refused') }}{% endif %}
[{{ message['role'] }}] {{ message['content'] }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]
{% endif %}"""


def about(folder):
    return json.loads((folder / "tokenizer_config.json").read_text())


@pytest.mark.parametrize("beside", [True, False])
def test_a_chat_template_asks_as_a_user_and_goes_in_and_out(
    folder, experiment, tmp_path, beside
):
    pytest.importorskip("jinja2")
    values = about(folder) | {"chat_template": "old" if beside else TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    if beside:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    out, back = tmp_path / "run", tmp_path / "back"
    begin(open_source(folder), out, config=experiment())
    flags = [f"--workdir={out}", "--family=mistral", f"--out={back}"]
    assert main(["export", *flags]) == 0
    for path in (folder, back):
        tokenizer = tokenizer_of(open_source(path))
        assert asked(tokenizer, "Hi") == "<|bos|>\n[user] Hi\n[assistant]\n"
    with pytest.raises(ConfigError, match="the chat template fails: refused"):
        asked(load(out)[1], "no")


def test_a_chat_is_drawn_by_command_if_there_is_a_template(folder, capsys):
    pytest.importorskip("jinja2")
    command = [f"--checkpoint={folder}", "--tokens=3", "--prompt=Hi", "--chat"]
    assert sample.main(command) == 2
    assert "has no chat template (chat_template.jinja, or" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert sample.main(command) == 0
    assert capsys.readouterr().out.startswith("Hi\n")
    (folder / "tools.json").write_text('[{"name": "hours"}]')
    (folder / "chat_template.jinja").write_text("{{ raise_exception(tools[0].name) }}")
    assert sample.main([*command, f"--tools={folder / 'tools.json'}"]) == 2
    assert "the chat template fails: hours" in capsys.readouterr().err
