"""The families of models that come in and go out, each a table and no code.

``Family`` has the name of the architecture, the fields of its ``config.json`` and its
tensors. What differs between two families in the forward pass is a field of our own
config, set by ``fields.facts`` or read from the file.
"""

from typing import Any, NamedTuple

from sparsejax.interop.fields import NEEDED, WORDS, Field, Fields, only
from sparsejax.interop.layout import Tensor
from sparsejax.interop.positions import Windows

__all__ = ["FAMILIES", "Family"]


class Family(NamedTuple):
    """What the checkpoints of an architecture look like."""

    architecture: str
    fields: Fields
    tensors: tuple[Tensor, ...]


IN = "model.layers.{l}."
ATTEND = f"{IN}self_attn."


def _same(name: str, path: str, default: Any = NEEDED) -> Field:
    return Field((name,), (path,), default)


ENDS = (
    Tensor("embedding", "model.embed_tokens.weight", "v d"),
    Tensor("norm/scale", "model.norm.weight", "d"),
    Tensor("unembedding", "lm_head.weight", "v d"),
    Tensor("layer/attention_norm/scale", f"{IN}input_layernorm.weight", "d"),
    Tensor("layer/norm/scale", f"{IN}post_attention_layernorm.weight", "d"),
)
ATTENTION = (
    Tensor("layer/attention/query", f"{ATTEND}q_proj.weight", "(h c) d"),
    Tensor("layer/attention/key", f"{ATTEND}k_proj.weight", "(g c) d"),
    Tensor("layer/attention/value", f"{ATTEND}v_proj.weight", "(g c) d"),
    Tensor("layer/attention/out", f"{ATTEND}o_proj.weight", "d (h c)"),
)
BIASES = (
    Tensor("layer/attention/query_bias", f"{ATTEND}q_proj.bias", "(h c)"),
    Tensor("layer/attention/key_bias", f"{ATTEND}k_proj.bias", "(g c)"),
    Tensor("layer/attention/value_bias", f"{ATTEND}v_proj.bias", "(g c)"),
    Tensor("layer/attention/out_bias", f"{ATTEND}o_proj.bias", "d"),
)
HEAD_NORMS = (
    Tensor("layer/attention/query_norm", f"{ATTEND}q_norm.weight", "c"),
    Tensor("layer/attention/key_norm", f"{ATTEND}k_norm.weight", "c"),
)
WIDE_NORMS = (
    Tensor("layer/attention/query_norm", f"{ATTEND}q_norm.weight", "(h c)"),
    Tensor("layer/attention/key_norm", f"{ATTEND}k_norm.weight", "(g c)"),
)
GATED = (
    Tensor("layer/ffn/gate", f"{IN}mlp.gate_proj.weight", "f d"),
    Tensor("layer/ffn/up", f"{IN}mlp.up_proj.weight", "f d"),
    Tensor("layer/ffn/down", f"{IN}mlp.down_proj.weight", "d f"),
)
EXPERTS = (
    Tensor("layer/moe/router", f"{IN}mlp.gate.weight", "e d"),
    Tensor("layer/moe/gate", f"{IN}mlp.experts.{{e}}.gate_proj.weight", "f d"),
    Tensor("layer/moe/up", f"{IN}mlp.experts.{{e}}.up_proj.weight", "f d"),
    Tensor("layer/moe/down", f"{IN}mlp.experts.{{e}}.down_proj.weight", "d f"),
)
SPARSE = f"{IN}block_sparse_moe."
MIXTRAL_EXPERTS = (
    Tensor("layer/moe/router", f"{SPARSE}gate.weight", "e d"),
    Tensor("layer/moe/gate", f"{SPARSE}experts.{{e}}.w1.weight", "f d"),
    Tensor("layer/moe/up", f"{SPARSE}experts.{{e}}.w3.weight", "f d"),
    Tensor("layer/moe/down", f"{SPARSE}experts.{{e}}.w2.weight", "d f"),
)
TOGETHER = f"{IN}mlp.experts."
GPT_OSS_EXPERTS = (
    Tensor("layer/attention/sinks", f"{ATTEND}sinks", "h"),
    Tensor("layer/moe/router", f"{IN}mlp.router.weight", "e d"),
    Tensor("layer/moe/router_bias", f"{IN}mlp.router.bias", "e"),
    Tensor("layer/moe/gate", f"{TOGETHER}gate_up_proj", "e d (f 2)", 0),
    Tensor("layer/moe/up", f"{TOGETHER}gate_up_proj", "e d (f 2)", 1),
    Tensor("layer/moe/down", f"{TOGETHER}down_proj", "e f d"),
    Tensor("layer/moe/gate_bias", f"{TOGETHER}gate_up_proj_bias", "e (f 2)", 0),
    Tensor("layer/moe/up_bias", f"{TOGETHER}gate_up_proj_bias", "e (f 2)", 1),
    Tensor("layer/moe/down_bias", f"{TOGETHER}down_proj_bias", "e d"),
)
SHARED = f"{IN}mlp.shared_experts."
DEEPSEEK_EXPERTS = (
    *EXPERTS,
    Tensor("layer/moe/bias", f"{IN}mlp.gate.e_score_correction_bias", "e"),
    Tensor("layer/moe/shared_gate", f"{SHARED}gate_proj.weight", "f d"),
    Tensor("layer/moe/shared_up", f"{SHARED}up_proj.weight", "f d"),
    Tensor("layer/moe/shared_down", f"{SHARED}down_proj.weight", "d f"),
)

SIZES = (
    _same("hidden_size", "width"),
    _same("num_hidden_layers", "depth"),
    _same("num_attention_heads", "heads"),
    _same("num_key_value_heads", "kv_heads", None),
    _same("tie_word_embeddings", "tied", False),
    only("attention_dropout", 0.0),
)
NORMS = ("norm_epsilon", "attention.norm_epsilon")
EPSILON = Field(("rms_norm_eps",), NORMS, 1e-6)
EPSILON_5 = Field(("rms_norm_eps",), NORMS, 1e-5)
HEAD = _same("head_dim", "attention.head_width", None)
ACTIVATION = Field(("hidden_act",), ("ffn.activation",), "silu", words=WORDS)
DENSE = (_same("intermediate_size", "ffn.hidden"), ACTIVATION)
ALL_BIASES = ("attention.qkv_biases", "attention.out_bias")
MAY_BIAS = Field(("attention_bias",), ALL_BIASES, False)
RENORMALIZE = "ffn.router_arguments.renormalize"
PER_TOKEN = _same("num_experts_per_tok", "ffn.per_token")

SHARED_EXPERTS = Field(("n_shared_experts",), ("ffn.shared",), None, times="ffn.hidden")
DENSE_HIDDEN = Field(("intermediate_size",), ("dense_hidden",), 0, when="dense_layers")

PLAIN = {"embedding_scale": 1.0, "attention.qk_norm": False}
NORMED = {"embedding_scale": 1.0, "attention.qk_norm": True}
WIDELY = {**NORMED, "attention.qk_norm_over": "heads"}
MIXED = {"ffn.kind": "moe", "ffn.router": "softmax_top_k"}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD,
                EPSILON,
                *DENSE,
                MAY_BIAS,
                only("mlp_bias", False),
                only("pretraining_tp", 1),
                only("rope_interleaved", False),
            ),
            {**PLAIN, "ffn.kind": "gated"},
        ),
        (*ENDS, *ATTENTION, *BIASES, *GATED),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        Fields(
            (*SIZES, HEAD, EPSILON, *DENSE),
            {**PLAIN, "ffn.kind": "gated"},
            Windows("every", size=4096),
            context=131_072,
        ),
        (*ENDS, *ATTENTION, *GATED),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        Fields(
            (*SIZES, HEAD, EPSILON, *DENSE),
            {**PLAIN, "ffn.kind": "gated", "attention.qkv_biases": True},
            Windows("listed", size=4096, switched=True),
            context=32_768,
        ),
        (*ENDS, *ATTENTION, *BIASES, *GATED),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        Fields(
            (*SIZES, HEAD._replace(default=128), EPSILON, *DENSE, MAY_BIAS),
            {**NORMED, "ffn.kind": "gated"},
            Windows("listed", size=4096, switched=True),
            context=32_768,
        ),
        (*ENDS, *ATTENTION, *BIASES, *HEAD_NORMS, *GATED),
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD,
                EPSILON_5,
                *DENSE,
                PER_TOKEN,
                _same("num_local_experts", "ffn.experts", 8),
            ),
            {**PLAIN, **MIXED},
            Windows("every"),
            theta=1e6,
            context=131_072,
        ),
        (*ENDS, *ATTENTION, *MIXTRAL_EXPERTS),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD,
                EPSILON_5,
                *DENSE,
                PER_TOKEN,
                MAY_BIAS,
                _same("num_experts", "ffn.experts"),
                only("clip_qkv", None),
                _same("norm_topk_prob", RENORMALIZE, False),
            ),
            {**WIDELY, **MIXED},
            context=4096,
        ),
        (*ENDS, *ATTENTION, *BIASES, *WIDE_NORMS, *EXPERTS),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD,
                EPSILON,
                ACTIVATION,
                PER_TOKEN,
                MAY_BIAS,
                Field(("num_experts", "num_local_experts"), ("ffn.experts",)),
                _same("moe_intermediate_size", "ffn.hidden"),
                _same("norm_topk_prob", RENORMALIZE, False),
                only("decoder_sparse_step", 1),
                only("mlp_only_layers", [], None),
                # Of dense layers, which there are none of.
                Field(("intermediate_size",), default=0),
            ),
            {**NORMED, **MIXED},
            Windows("every", size=4096, switched=True),
            context=32_768,
        ),
        (*ENDS, *ATTENTION, *BIASES, *HEAD_NORMS, *EXPERTS),
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD._replace(default=64),
                EPSILON_5,
                PER_TOKEN,
                Field(("num_local_experts", "num_experts"), ("ffn.experts",)),
                _same("intermediate_size", "ffn.hidden"),
                only("hidden_act", "silu"),
                only("swiglu_limit", 7.0),
                only("swiglu_alpha", 1.702),
                Field(("attention_bias",), ALL_BIASES, True),
            ),
            {
                **PLAIN,
                "attention.learned_sinks": True,
                "ffn.kind": "moe",
                "ffn.router": "top_k_softmax",
                "ffn.router_bias": True,
                "ffn.activation": "clamped_swiglu",
                "ffn.biases": True,
            },
            Windows("listed", size=128, alternate=True),
            theta=150_000.0,
            scaling={
                "rope_type": "yarn",
                "factor": 32.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            context=131_072,
        ),
        (*ENDS, *ATTENTION, *BIASES, *GPT_OSS_EXPERTS),
    ),
    # Routing of DeepSeek-V3, behind the attention of Qwen3.
    "dots1": Family(
        "Dots1ForCausalLM",
        Fields(
            (
                *SIZES,
                HEAD,
                EPSILON,
                ACTIVATION,
                PER_TOKEN,
                MAY_BIAS,
                _same("n_routed_experts", "ffn.experts"),
                _same("moe_intermediate_size", "ffn.hidden"),
                _same("n_group", "ffn.router_arguments.groups", 1),
                _same("topk_group", "ffn.router_arguments.kept_groups", 1),
                _same("routed_scaling_factor", "ffn.router_arguments.scale", 1.0),
                _same("norm_topk_prob", RENORMALIZE, False),
                SHARED_EXPERTS,
                _same("first_k_dense_replace", "dense_layers", 0),
                DENSE_HIDDEN,
            ),
            {
                **NORMED,
                "ffn.kind": "moe",
                "ffn.router": "sigmoid_top_k",
                "ffn.bias_rate": 0.0,
            },
            Windows("listed", size=4096),
        ),
        (*ENDS, *ATTENTION, *BIASES, *HEAD_NORMS, *GATED, *DEEPSEEK_EXPERTS),
    ),
}
