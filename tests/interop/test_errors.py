"""Whatever is wrong with a checkpoint is named before a number is read."""

import json
import mmap
import pickle

import numpy as np
import pytest

from sparsejax.config import ConfigError, convert
from sparsejax.interop import CheckpointFileError, export, load_model, open_source
from sparsejax.interop.export import appears
from sparsejax.interop.families import FAMILIES
from sparsejax.interop.fields import describe, document
from sparsejax.interop.files import read
from sparsejax.interop.folder import INDEX, SINGLE
from sparsejax.nn import ModelConfig
from tests.interop.checkpoints import config_of, tensors_of, write_folder

SILENT = {"rope_scaling": None}
MSCALE = {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}
MSCALE |= {"original_max_position_embeddings": 16}
FULL = "full_attention"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def written(tmp_path):
    """A folder of a family, with its tensors or its config changed."""

    def write(change=dict, *, shard_bytes=1 << 30, **config):
        config = config_of("llama", **config)
        tensors = tensors_of("llama", config_of("llama"))
        folder = tmp_path / "hf"
        return write_folder(folder, config, change(tensors), shard_bytes=shard_bytes)

    return write


def test_missing_unexpected_and_misshapen_tensors_are_named_together(written):
    def change(tensors):
        del tensors[NORM]
        tensors[EMBEDDING] = tensors[EMBEDDING][:-1]
        return tensors | {"model.layers.7.extra": np.zeros(3, np.float32)}

    with pytest.raises(ConfigError) as found:
        load_model(open_source(written(change)))
    said = str(found.value)
    assert f"missing: {NORM}" in said
    assert "unexpected: model.layers.7.extra" in said
    assert f"misshapen: {EMBEDDING} (69, 16) instead of (70, 16)" in said


def test_the_same_fault_of_a_run_of_layers_is_named_once(written):
    query, key = (f"self_attn.{x}_proj.weight" for x in "qk")

    def change(_):
        named = {
            f"model.layers.{n}.{name}": np.zeros((16, 16), np.float32)
            for n in range(40)
            for name in (query, *(f"mlp.experts.{e}.up" for e in range(3)))
        }
        named[f"model.layers.3.{query}"] = np.zeros((3, 3), np.float32)
        return named

    with pytest.raises(ConfigError) as found:
        load_model(open_source(written(change, num_hidden_layers=40)))
    said = str(found.value)
    assert f"model.layers.{{0..39}}.{key}" in said
    assert "unexpected: model.layers.{0..39}.mlp.experts.{0..2}.up;" in said
    for layer, shape in (("{0..2}", 16), ("3", 3), ("{4..39}", 16)):
        wrong = f"model.layers.{layer}.{query} ({shape}, {shape}) instead of (32, 16)"
        assert wrong in said
    assert "more" not in said
    assert len(said) < 3000


def test_rotations_that_old_programs_wrote_are_passed_over(written):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load_model(open_source(written(lambda x: x | {name: np.zeros(4, np.float32)})))


def test_a_tied_head_that_is_not_the_embedding_is_refused(written):
    with pytest.raises(ConfigError, match=r"lm_head.weight is not model.embed_tokens"):
        load_model(open_source(written(tie_word_embeddings=True)))


def test_a_tied_head_that_was_written_twice_is_read_once(written):
    change = lambda x: x | {"lm_head.weight": x[EMBEDDING]}  # noqa: E731
    load_model(open_source(written(change, tie_word_embeddings=True)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias=True is not supported here; only False"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"logit_scale": 2.0}, "logit_scale=2.0 is not supported here and may change"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "rope_type='dynamic'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "x of 'linear'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rotations of all"),
        (
            {"rope_parameters": {"rope_theta": 9.0}},
            "rope_scaling=.* and rope_param.* say",
        ),
        (
            {"rope_parameters": {"full_attention": {}}, **SILENT},
            "full_attention of 'def",
        ),
        (
            {"rope_parameters": {"rope_theta": "9"}, **SILENT},
            "rope_theta='9': expected",
        ),
        ({"rope_scaling": 4}, "rope_scaling=4: expected dict"),
        (
            {"quantization_config": "mxfp4"},
            "quantization_config='mxfp4': expected dict",
        ),
        ({"architectures": 5}, "architectures=5: expected list"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2': expected int"),
        ({"hidden_act": ["silu"]}, r"hidden_act=\['silu'\]: expected a single value"),
        ({"quantization_config": {"bits": 4}}, "weights are quantized"),
        ({"architectures": ["BertModel"]}, r"\['BertModel'\] are not known here; .*Ll"),
        ({"hidden_size": 18}, "heads=4: must divide width=18|misshapen"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(written, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_model(open_source(written(**changes)))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'noaux_tc' is not .* only group"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "kv_heads=2: must be heads=4"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy' is not"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not"),
        (
            "deepseek_v3",
            {"rope_scaling": MSCALE | {"mscale_all_dim": None}},
            "mscale=1.0: must be positive, together with mscale_all=None",
        ),
        ("llama", {"rope_scaling": MSCALE}, "mscale is for channels that are not all"),
        (
            "gpt_oss",
            {
                "num_hidden_layers": 3,
                "layer_types": [FULL, "sliding_attention", FULL],
            },
            "only windows in all layers, or in all but every n-th",
        ),
        ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported here; only Fa"),
        ("dots1", {"moe_intermediate_size": None}, "ffn.hidden=None: expected int"),
        ("gpt_oss", {"layer_types": [FULL] * 3}, "must be .* for each of 2 layers"),
        (
            "qwen3",
            {"layer_types": [FULL, "linear_attention"]},
            "'linear_attention'.*must",
        ),
        (
            "qwen2",
            {"num_hidden_layers": 30, "use_sliding_window": True},
            "only windows in all layers, or in all but every n-th",
        ),
    ],
)
def test_what_a_family_can_say_but_not_do_here_is_refused(family, changes, message):
    fields = FAMILIES[family].fields
    with pytest.raises(ConfigError, match=message):
        describe(fields, config_of(family, **changes), source="here")


def test_two_spellings_of_the_same_rotations_are_read():
    there = config_of("llama")
    newer = there["rope_scaling"] | {"rope_theta": there["rope_theta"]}
    fields = FAMILIES["llama"].fields
    both = describe(fields, there | {"rope_parameters": newer}, source="here")
    assert both == describe(fields, there, source="here")


def test_what_means_nothing_to_a_family_changes_nothing():
    fields = FAMILIES["deepseek_v2"].fields
    greedy = {"topk_method": "greedy", "head_dim": 6, "qk_head_dim": 10, "ep_size": 1}
    model = describe(fields, config_of("deepseek_v2", **greedy), source="here").model
    arguments = model.ffn.router_arguments
    assert (arguments["groups"], arguments["kept_groups"]) == (1, 1)
    there = document(fields, model, 70)
    assert there["topk_method"] == "group_limited_greedy"
    assert not {"head_dim", "qk_head_dim", "ep_size"} & set(there)


def test_layers_that_predict_further_ahead_are_passed_over(tmp_path):
    config, name = config_of("deepseek_v3"), "model.layers.2.eh_proj.weight"
    tensors = tensors_of("deepseek_v3", config) | {name: np.zeros(3, np.float32)}
    told = config | {"num_nextn_predict_layers": 1}
    load_model(open_source(write_folder(tmp_path / "told", told, tensors)))
    with pytest.raises(ConfigError, match=f"unexpected: {name}"):
        load_model(open_source(write_folder(tmp_path / "silent", config, tensors)))


def test_all_faults_of_a_config_are_named_at_once(written):
    with pytest.raises(ConfigError, match=r"attention_dropout=0.1 .*mlp_bias=True "):
        load_model(open_source(written(mlp_bias=True, attention_dropout=0.1)))


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointFileError, match=r"pytorch_model\.bin: pickled"):
        open_source(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -1])
def test_a_file_that_was_cut_short_is_named(written, keep):
    file = written() / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointFileError, match=r"model\.safetensors: .*cut short"):
        open_source(file.parent)


def test_bytes_that_nothing_explains_are_refused(written):
    folder = written(lambda x: x | {NORM: np.zeros(16, np.uint8)})
    with pytest.raises(CheckpointFileError, match=f"{NORM} has numbers of kind U8, "):
        open_source(folder)


def test_a_header_that_is_another_kind_of_json_is_named(written):
    file = written() / SINGLE
    text = b'{"a": [3]}'
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointFileError, match="is not that of safetensors"):
        open_source(file.parent)


def test_numbers_of_a_kind_that_is_not_read_are_named(written):
    file = written() / SINGLE
    text = file.read_bytes()
    file.write_bytes(text.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(CheckpointFileError, match=r"kind I32; readable are F64"):
        open_source(file.parent)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "..", ""])
def test_an_index_that_points_outside_its_folder_is_refused(written, name):
    folder = written(shard_bytes=4000)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][NORM] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointFileError, match="not the name of a file in this"):
        open_source(folder)


def test_files_that_an_index_promises_are_missed_by_name(written):
    folder = written(shard_bytes=4000)
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointFileError, match=r"1\.safetensors of \d+ files"):
        open_source(folder)


def test_an_empty_or_absent_folder_is_named(tmp_path):
    with pytest.raises(CheckpointFileError, match=r"config\.json: is missing"):
        open_source(tmp_path)
    with pytest.raises(CheckpointFileError, match="no such folder"):
        open_source(tmp_path / "nowhere")


def test_a_model_that_a_family_cannot_say_is_not_exported(tmp_path):
    values = {"depth": 1, "width": 16, "heads": 2, "kv_heads": 2, "ffn": {"hidden": 8}}
    model = convert(ModelConfig, values)
    with pytest.raises(ConfigError) as found:
        document(FAMILIES["llama"].fields, model, 70)
    said = str(found.value)
    assert "model.attention.qk_norm=True, where it has False" in said
    assert "model.embedding_scale=None, where it has 1.0" in said


def test_a_family_of_experts_says_no_dense_model():
    model = describe(FAMILIES["llama"].fields, config_of("llama"), source="here").model
    with pytest.raises(ConfigError, match=r"no such model.*per_token=None: expected"):
        document(FAMILIES["mixtral"].fields, model, 70)


def test_a_family_or_dtype_that_is_not_written_is_named(written, tmp_path):
    model = load_model(open_source(written()))
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        export(model, tmp_path / "out", family="lama")
    with pytest.raises(ConfigError, match=r"--dtype=mxfp4: .* are only read"):
        export(model, tmp_path / "out", family="llama", dtype="mxfp4")


def test_a_failed_export_leaves_nothing(written, tmp_path):
    model = load_model(open_source(written()))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TypeError):
        export(model, tmp_path / "out", family="llama", files={"tokenizer.json": 3})
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_not_written_over(tmp_path):
    with pytest.raises(ConfigError, match="is there already"), appears(tmp_path):
        pass


def test_reading_a_file_reads_no_number(written):
    file = written() / SINGLE
    assert all(isinstance(owner(x), mmap.mmap) for x in read(file).values())


def owner(x):
    while isinstance(x, np.ndarray):
        x = x.base
    return x
