"""A dense model of one billion parameters, for a pod slice.

    python train.py --config=configs/dense_1b.py --config.data.name=c4/en

Judge it without the hardware first:

    python train.py --config=configs/dense_1b.py --aot=tpu:v5e:16x16
    python train.py --config=configs/dense_1b.py --aot=gpu:h200

One H200 takes the batch in parts: --config.optim.accumulate=64.
"""

from ml_collections import ConfigDict

from configs import dense


def get_config() -> ConfigDict:
    """Twenty layers of width 2048 over 4096 tokens, in bfloat16."""
    config = dense.get_config()
    config.data.update(seq_len=4096, batch_size=512, tokenizer="bpe", vocab_size=32_768)
    config.model.update(
        depth=20, width=2048, heads=16, kv_heads=8, dtype="bfloat16", remat="full"
    )
    config.model.attention.update(block_q=512, block_kv=512)
    config.model.ffn.hidden = 5632
    config.optim.update(learning_rate=3e-4, warmup=2000)
    config.mesh.update(data=1, fsdp=-1)
    config.train.update(
        steps=50_000, log_every=50, eval_every=1000, save_every=1000, loss_chunk=2048
    )
    return config
