"""What several families of checkpoints have in common: tensors, and fields.

``Family`` has the name of the architecture, the fields of its ``config.json`` and its
tensors.
"""

from typing import Any, NamedTuple

from sparsejax.interop.fields import NEEDED, WORDS, Field, Fields, only
from sparsejax.interop.layout import Tensor


class Family(NamedTuple):
    """What the checkpoints of an architecture look like."""

    architecture: str
    fields: Fields
    tensors: tuple[Tensor, ...]
    ahead: tuple[str, ...] = ()  # fields that count layers past the last, to pass over


IN = "model.layers.{l}."
ATTEND = f"{IN}self_attn."


def same(name: str, path: str, default: Any = NEEDED) -> Field:
    """Make a field that is one of ours under another name."""
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
WITH_SHARED = (
    *EXPERTS,
    Tensor("layer/moe/shared_gate", f"{SHARED}gate_proj.weight", "f d"),
    Tensor("layer/moe/shared_up", f"{SHARED}up_proj.weight", "f d"),
    Tensor("layer/moe/shared_down", f"{SHARED}down_proj.weight", "d f"),
)
BIAS = Tensor("layer/moe/bias", f"{IN}mlp.gate.e_score_correction_bias", "e")
LATENT = (
    Tensor("layer/attention/query", f"{ATTEND}q_proj.weight", "(h c) d"),
    Tensor("layer/attention/query_down", f"{ATTEND}q_a_proj.weight", "c d"),
    Tensor("layer/attention/query_down_bias", f"{ATTEND}q_a_proj.bias", "c"),
    Tensor("layer/attention/query_norm", f"{ATTEND}q_a_layernorm.weight", "c"),
    Tensor("layer/attention/query_up", f"{ATTEND}q_b_proj.weight", "(h c) z"),
    Tensor("layer/attention/down", f"{ATTEND}kv_a_proj_with_mqa.weight", "c d"),
    Tensor("layer/attention/down_bias", f"{ATTEND}kv_a_proj_with_mqa.bias", "c"),
    Tensor("layer/attention/latent_norm", f"{ATTEND}kv_a_layernorm.weight", "c"),
    Tensor("layer/attention/up", f"{ATTEND}kv_b_proj.weight", "(h c) z"),
    Tensor("layer/attention/out", f"{ATTEND}o_proj.weight", "d (h c)"),
    Tensor("layer/attention/out_bias", f"{ATTEND}o_proj.bias", "d"),
)

SIZES = (
    same("hidden_size", "width"),
    same("num_hidden_layers", "depth"),
    same("num_attention_heads", "heads"),
    same("num_key_value_heads", "kv_heads", None),
    same("tie_word_embeddings", "tied", False),
    only("attention_dropout", 0.0),
)
NORMS = ("norm_epsilon", "attention.norm_epsilon")
EPSILON = Field(("rms_norm_eps",), NORMS, 1e-6)
EPSILON_5 = Field(("rms_norm_eps",), NORMS, 1e-5)
# The norms of latent vectors have transformers' own default.
LATENT_EPSILON = same("rms_norm_eps", "norm_epsilon", 1e-6)
HEAD = same("head_dim", "attention.head_width", None)
ACTIVATION = Field(("hidden_act",), ("ffn.activation",), "silu", words=WORDS)
DENSE = (same("intermediate_size", "ffn.hidden"), ACTIVATION)
ALL_BIASES = ("attention.qkv_biases", "attention.out_bias")
MAY_BIAS = Field(("attention_bias",), ALL_BIASES, False)
RENORMALIZE = "ffn.router_arguments.renormalize"
GROUPS = same("n_group", "ffn.router_arguments.groups", 1)
KEPT_GROUPS = same("topk_group", "ffn.router_arguments.kept_groups", 1)
PER_TOKEN = same("num_experts_per_tok", "ffn.per_token")

# Of latent attention, and what transformers makes of the sizes itself.
LATENT_WIDTHS = (
    same("q_lora_rank", "attention.latent.query_rank", 1536),
    same("kv_lora_rank", "attention.latent.kv_rank", 512),
    same("qk_nope_head_dim", "attention.latent.plain_width", 128),
    same("qk_rope_head_dim", "attention.latent.rotated_width", 64),
    same("v_head_dim", "attention.latent.value_width", 128),
)
LATENT_IDLE = ("qk_head_dim", "head_dim", "auto_map")
LATENT_IDLE += ("ep_size", "aux_loss_alpha", "seq_aux")  # of training

SHARED_EXPERTS = Field(("n_shared_experts",), ("ffn.shared",), None, times="ffn.hidden")
DENSE_HIDDEN = Field(("intermediate_size",), ("dense_hidden",), 0, when="dense_layers")

PLAIN = {"embedding_scale": 1.0, "attention.qk_norm": False}
NORMED = {"embedding_scale": 1.0, "attention.qk_norm": True}
LATENTLY = {**NORMED, "attention.norm_epsilon": 1e-6}
WIDELY = {**NORMED, "attention.qk_norm_over": "heads"}
MIXED = {"ffn.kind": "moe", "ffn.router": "softmax_top_k"}
