"""Tiny checkpoints, as other programs write them, made of numbers drawn here."""

import json

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparsejax.interop.families import FAMILIES
from sparsejax.interop.fields import describe
from sparsejax.interop.files import Shape, plan, write
from sparsejax.interop.folder import INDEX, SINGLE
from sparsejax.interop.layout import disk_shape
from sparsejax.interop.load import abstract, needs

BASE = {
    "vocab_size": 70,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 100.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 6}
MLA |= {"v_head_dim": 8, "num_key_value_heads": 4}
SHARING = {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 4}
SHARING |= {"topk_group": 2, "n_shared_experts": 2, "moe_intermediate_size": 8}
SHARING |= {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
CONFIGS = {
    "llama": {"attention_bias": True, "rope_scaling": LLAMA3, "head_dim": 8},
    "mistral": {"sliding_window": 5, "tie_word_embeddings": True},
    "qwen2": {"use_mrope": False},
    "qwen3": {"head_dim": 8, "rope_parameters": {"rope_theta": 50.0}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**ROUTED, "norm_topk_prob": False},
    "qwen3_moe": {**ROUTED, "norm_topk_prob": True, "moe_intermediate_size": 8},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 6.0,
            "truncate": False,
            "original_max_position_embeddings": 16,
        },
    },
    "dots1": {**SHARING, "norm_topk_prob": True, "sliding_window": None},
    "deepseek_v2": {
        **MLA,
        **SHARING,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 6.0,
            "beta_slow": 1.0,
            "truncate": False,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "original_max_position_embeddings": 16,
        },
    },
    "deepseek_v3": {
        **MLA,
        **SHARING,
        "q_lora_rank": 10,
        "norm_topk_prob": True,
        "attention_bias": True,
        "rope_interleave": False,
    },
}


def config_of(family, **changes):
    architecture = {"architectures": [FAMILIES[family].architecture]}
    return {**BASE, **CONFIGS[family], **architecture, **changes}


def tensors_of(family, config, *, dtype="float32", seed=0):
    """Draw every tensor, under its own name, in its own shape."""
    fields = FAMILIES[family].fields
    model, vocabulary = describe(fields, config, source="test")
    state = nnx.state(abstract(model, vocabulary))
    rng, drawn = np.random.default_rng(seed), {}
    for need in needs(model, vocabulary, FAMILIES[family], state):
        shape = disk_shape(need.tensor.layout, need.sizes)
        for name in need.names.values():
            center = 1.0 if name.endswith("norm.weight") else 0.0
            values = center + 0.3 * rng.standard_normal(shape)
            drawn[name] = values.astype(jnp.dtype(dtype))
    return drawn


def write_folder(path, config, tensors, *, shard_bytes=1 << 30):
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    shapes = {name: Shape(x.shape, x.dtype) for name, x in tensors.items()}
    shards = plan(shapes, shard_bytes=shard_bytes)
    if len(shards) == 1:
        write(path / SINGLE, shapes, tensors.__getitem__)
        return path
    index = {}
    for number, names in enumerate(shards):
        part = {name: shapes[name] for name in names}
        write(path / f"{number}.safetensors", part, tensors.__getitem__)
        index |= dict.fromkeys(names, f"{number}.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": index}))
    return path
