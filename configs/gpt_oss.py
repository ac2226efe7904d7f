r"""Experts and routing as gpt-oss has them, at the size of the small configs.

    python train.py --config=configs/gpt_oss.py

A few minutes on two CPU cores; compare it with configs/moe.py. The other released
models' routing are arguments: Mixtral and Qwen3-MoE have softmax_top_k as it is, OLMoE
with router_arguments.renormalize=False, DeepSeek-V3 sigmoid_top_k with groups,
kept_groups, scale=2.5, bias_rate=0.001 and a shared expert.
"""

from ml_collections import ConfigDict

from configs import moe


def get_config() -> ConfigDict:
    """A softmax over the kept logits, clamped SwiGLU, biases."""
    config = moe.get_config()
    config.model.ffn.update(
        {
            "router": "top_k_softmax",
            "activation": "clamped_swiglu",
            "biases": True,
        }
    )
    return config
