"""In, trained on many devices, and out: by the commands alone."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.data import ByteTokenizer
from sparsejax.data.tokenizer_file import files_of
from sparsejax.interop import load_model, open_source
from sparsejax.train.trained import load
from sparsejax.tree import leaves
from tests.interop.checkpoints import config_of, tensors_of, write_folder
from tests.sources import ROOT

CHECKPOINT = config_of(
    "llama", vocab_size=258, tie_word_embeddings=True, attention_bias=False
)
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    scaling = {{"kind": "llama3", "factor": 4.0, "trained": 16}}
    return ConfigDict({{
        "data": {{
            "files": ("{here}/*.txt",), "cache_dir": "{here}/cache",
            "seq_len": 16, "batch_size": 8, "vocab_size": 258, "tokenizer": "file",
            "tokenizer_file": "{here}/run/tokenizer.json",
        }},
        "model": {{
            "depth": 2, "width": 16, "heads": 4, "kv_heads": 2,
            "embedding_scale": 1.0, "norm_epsilon": 1e-4, "context_length": 64,
            "attention": {{
                "block_q": 8, "block_kv": 8, "head_width": 8, "rope_theta": 100.0,
                "rope_scaling": scaling, "qk_norm": False, "norm_epsilon": 1e-4,
            }},
            "ffn": {{"hidden": 24}},
        }},
        "optim": {{"name": "adamw", "learning_rate": 1e-2}},
        "train": {{"steps": 2, "sample_tokens": 0}},
    }})
"""


def run(*command, devices=1):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    environment |= {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment)


def logits(model, ids):
    run = jax.jit(lambda model, ids: model.logits(model(ids).value))
    return np.asarray(run(model, jnp.asarray(ids)))[..., : model.vocabulary]


@pytest.mark.slow  # three programs, one of them compiled for eight devices
def test_a_checkpoint_is_trained_on_eight_devices_and_leaves_as_it_is(tmp_path):
    source = write_folder(tmp_path / "in", CHECKPOINT, tensors_of("llama", CHECKPOINT))
    for name, text in files_of(ByteTokenizer()).items():
        (source / name).write_text(text, encoding="utf-8")
    for number in range(64):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} says little. " * 4)
    config, workdir, out = (tmp_path / x for x in ("config.py", "run", "out"))
    config.write_text(CONFIG.format(here=tmp_path))
    interop = ("-m", "sparsejax.interop")
    run(
        *interop,
        "import",
        f"--source={source}",
        f"--out={workdir}",
        f"--config={config}",
    )
    mesh = ("--config.mesh.data=2", "--config.mesh.fsdp=4")
    run("train.py", f"--config={config}", f"--workdir={workdir}", *mesh, devices=8)
    run(*interop, "export", f"--workdir={workdir}", "--family=llama", f"--out={out}")

    ids = np.arange(32, dtype=np.int32).reshape(2, 16)
    trained, _ = load(workdir)
    expected = logits(trained, ids)
    jax.tree.map(
        np.testing.assert_array_equal,
        leaves(nnx.state(trained)),
        leaves(nnx.state(load_model(open_source(out)))),
    )
    begun = logits(load_model(open_source(source)), ids)
    assert np.abs(expected - begun).max() > 0.01 * np.abs(begun).max()
    assert json.loads((workdir / "summary.json").read_text())["finished"]
    if importlib.util.find_spec("transformers"):
        import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        import transformers  # noqa: PLC0415  # pyright: ignore[reportMissingImports]

        theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        with torch.inference_mode():
            found = theirs(torch.tensor(ids).long()).logits.numpy()
        # float32 on both sides, sums in other orders
        np.testing.assert_allclose(
            found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0
        )
