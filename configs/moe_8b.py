"""Eight billion parameters in 64 experts, of which 1.3 billion see each token.

    python train.py --config=configs/moe_8b.py --config.data.name=c4/en

Judge it without the hardware first:

    python train.py --config=configs/moe_8b.py --aot=tpu:v5p:8x8x8
"""

from ml_collections import ConfigDict

from configs import dense_1b


def get_config() -> ConfigDict:
    """Eight of 64 experts a token, experts over 16 chips, windows in every layer.

    A chip has room for twice the visits of a balanced load; metrics count what is lost.
    """
    config = dense_1b.get_config()
    config.data.batch_size = 1024
    config.model.depth = 24
    config.model.attention.update(
        pattern="streaming_llm", arguments={"sinks": 4, "window": 1024}
    )
    config.model.ffn = {
        "kind": "moe",
        "experts": 64,
        "per_token": 8,
        "hidden": 832,
        "router": "softmax_top_k",
        "dispatcher": "grouped",
        "exchange": "ragged_all_to_all",
        "exchange_factor": 2.0,
    }
    config.mesh.update(data=-1, fsdp=8, expert=16)
    return config
