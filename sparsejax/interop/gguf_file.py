"""Models in a GGUF file: numbers of four bits, names and tokenizer in one place.

What comes out is what the file's own programs compute with: its numbers multiplied
out, queries and keys in the order that a folder of the same model has. A file is a
``Source`` like a folder, and is read tensor by tensor.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from sparsejax.interop.files import CheckpointFileError
from sparsejax.interop.gguf_header import Entry, read_header
from sparsejax.interop.load import Source

__all__ = ["open_gguf"]

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Names of a config's fields, behind the name of the architecture.
FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "head_dim": "rope.dimension_count",
}
# What a config may say besides that changes nothing, likewise.
IDLE = {"vocab_size", "rope.freq_base", "attention.layer_norm_rms_epsilon"}
DIGITS_APART = frozenset({"smollm"})  # tokenizers that cut numbers into digits
CONTROL, USER = 3, 4  # kinds of tokens that text is cut at


def open_gguf(path: Path) -> Source:
    """Open a file of the architecture ``llama``; no tensor is read.

    Raises:
        CheckpointFileError: if it is not such a file, or says what is not supported.
    """
    try:
        import gguf  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise CheckpointFileError(
            f"{path}: reading it takes another package: pip install gguf"
        ) from None
    try:
        about, found = read_header(path)
        rows = {name: _rows(path, entry) for name, entry in found.items()}
    except (ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise CheckpointFileError(
            f"{path}: not a GGUF file, or cut short: {error}"
        ) from None
    if (kind := about.get("general.architecture")) != "llama":
        raise CheckpointFileError(
            f"{path}: general.architecture={kind!r} is not supported here; only 'llama'"
        )
    try:
        config = _config(path, about, tied="output.weight" not in found)
        files = _tokenizer(path, about)
    except LookupError as error:
        raise CheckpointFileError(
            f"{path}: its header lacks what it should name: {error}"
        ) from None
    names = {_name(path, name): name for name in found}
    shapes = {theirs: found[name].shape for theirs, name in names.items()}

    def read(theirs: str) -> np.ndarray:
        name = names[theirs]
        size, start = math.prod(rows[name]), found[name].start
        packed = np.fromfile(path, np.uint8, size, offset=start).reshape(rows[name])
        kind = gguf.GGMLQuantizationType(found[name].kind)
        whole = gguf.dequantize(packed, kind)
        heads = _paired_heads(theirs, config)
        return np.ascontiguousarray(_halved(whole, heads)) if heads else whole

    return Source(path, config, shapes, read, files)


def _rows(path: Path, entry: Entry) -> tuple[int, ...]:
    """Give the shape of a tensor's bytes, which must be there."""
    import gguf  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

    kind = gguf.GGMLQuantizationType(entry.kind)
    shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, kind)
    if entry.start + math.prod(shape) > path.stat().st_size:
        raise ValueError("ends within its numbers")
    return shape


def _config(path: Path, about: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """Say in the words of a folder's ``config.json`` what the file says."""
    own = {
        name.removeprefix("llama."): value
        for name, value in about.items()
        if name.startswith("llama.")
    }
    odd = sorted(own.keys() - set(FIELDS.values()) - IDLE)
    if odd:
        raise CheckpointFileError(
            f"{path}: llama.{odd[0]}={own[odd[0]]!r} is not supported here and may"
            " change what the model computes"
        )
    config = {name: own[there] for name, there in FIELDS.items() if there in own}
    # Single precision, written as the shortest number that it is.
    epsilon = own["attention.layer_norm_rms_epsilon"]
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": float(str(np.float32(epsilon))),
        "rope_theta": float(str(np.float32(own.get("rope.freq_base", 10_000.0)))),
        "vocab_size": len(about["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": tied,
    }


def _name(path: Path, name: str) -> str:
    """Give the name of a tensor in a folder."""
    if name in ENDS:
        return ENDS[name]
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER:
        raise CheckpointFileError(f"{path}: {name}: a tensor that nothing here reads")
    return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"


def _paired_heads(name: str, config: dict[str, Any]) -> int:
    """Count the heads of a tensor whose rotated channels lie side by side."""
    if name.endswith("q_proj.weight"):
        return config["num_attention_heads"]
    if not name.endswith("k_proj.weight"):
        return 0
    return config.get("num_key_value_heads", config["num_attention_heads"])


def _halved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Move the partner of each rotated channel from beside it to half a head away."""
    paired = weight.reshape(heads, -1, 2, weight.shape[1])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(path: Path, about: dict[str, Any]) -> dict[str, str]:
    """Write the file's tokenizer as a folder has it."""
    model = about.get("tokenizer.ggml.model")
    cut = about.get("tokenizer.ggml.pre")
    if model != "gpt2" or cut not in DIGITS_APART:
        raise CheckpointFileError(
            f"{path}: a tokenizer of kind {model!r}, {cut!r} is not supported here"
        )
    names = about["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    vocabulary = {name: number for number, name in enumerate(names)}
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, level])
    pairs.decoder = tokenizers.decoders.ByteLevel()
    kinds = zip(names, about["tokenizer.ggml.token_type"], strict=True)
    pairs.add_special_tokens(
        [
            tokenizers.AddedToken(name, special=kind == CONTROL, normalized=False)
            for name, kind in kinds
            if kind in (CONTROL, USER)
        ]
    )
    first = about.get("tokenizer.ggml.bos_token_id")
    if about.get("tokenizer.ggml.add_bos_token") and first is not None:
        name = names[first]
        pairs.post_processor = tokenizers.processors.TemplateProcessing(
            single=[name, "$A"], special_tokens=[(name, first)]
        )
    says = {"model_max_length": about.get("llama.context_length")}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = about.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            says[f"{name}_token"] = names[number]
    if template := about.get("tokenizer.chat_template"):
        says["chat_template"] = template
    says["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        "tokenizer.json": pairs.to_str(),
        "tokenizer_config.json": json.dumps(says, indent=2),
    }
