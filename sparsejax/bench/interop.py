"""How close checkpoints come to what Hugging Face's transformers computes of them.

    python -m sparsejax.bench interop

Small models of every family are drawn by transformers (PyTorch, CPU, float32), written
to disk, read here, and written again. Differences are the largest of any number, over
the largest of the reference: logits of a prefill, of a padded batch, of tokens decoded
one by one; routers' logits; weights of the chosen experts; gradients of the loss;
logits of what comes back out. ``same`` says whether all experts chosen are the same.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from flax import nnx

from sparsejax.bench.table import markdown, provenance, write_rows
from sparsejax.interop import FAMILIES, export, load_model, open_source
from sparsejax.interop.layout import disk_shape, ours
from sparsejax.interop.load import needs
from sparsejax.nn.transformer import Transformer
from sparsejax.tree import leaves
from sparsejax.typing import Array

VOCABULARY, LENGTH, PAD = 96, 24, 6
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
ROUTED = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "truncate": False}
TRAINED = {"original_max_position_embeddings": 16}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "v_head_dim": 12}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
SHARING = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4}
SHARING |= {"topk_group": 2, "first_k_dense_replace": 1, "n_shared_experts": 2}
SHARING |= {"moe_intermediate_size": 24, "routed_scaling_factor": 2.5}
# What of each family's config is not the default or a size.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama, scaled": ("Llama", {"rope_parameters": LLAMA3 | TRAINED}),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mixtral": ("Mixtral", LOCAL),
    "olmoe": ("Olmoe", ROUTED),
    "qwen3_moe": (
        "Qwen3Moe",
        ROUTED | {"moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16},
    ),
    "gpt_oss": (
        "GptOss",
        LOCAL
        | {"head_dim": 16, "sliding_window": 9, "rope_parameters": YARN | TRAINED},
    ),
    "dots1": (
        "Dots1",
        SHARING | {"norm_topk_prob": True, "head_dim": 16},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        MLA
        | SHARING
        | {"q_lora_rank": None, "topk_method": "group_limited_greedy"}
        | {"rope_parameters": YARN | TRAINED | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2",
        MLA | SHARING | {"q_lora_rank": 20, "attention_bias": True},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        MLA
        | SHARING
        | {"q_lora_rank": 20, "attention_bias": True}
        | {"rope_parameters": YARN | TRAINED | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek_v3, halves": (
        "DeepseekV3",
        MLA | SHARING | {"q_lora_rank": None, "rope_interleave": False},
    ),
}
COLUMNS = {
    "model": "model",
    "prefill": "prefill",
    "padded": "padded batch",
    "decode": "decode",
    "scores": "router logits",
    "router": "expert weights",
    "same": "same experts",
    "gradient": "gradients",
    "export": "back out",
}


class Pair(NamedTuple):
    """One checkpoint, in both programs."""

    name: str
    theirs: Any
    ours: Transformer


def drawn(model: str, folder: Path) -> Pair:
    """Make a model of large random weights, so that nothing is nearly linear."""
    torch.manual_seed(0)
    stem, changes = MODELS[model]
    config = getattr(transformers, f"{stem}Config")(**(SIZES | changes))
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{stem}ForCausalLM")(config).eval()
    with torch.no_grad():
        named = [*theirs.named_parameters(), *theirs.named_buffers()]
        for name, values in named:
            if "inv_freq" not in name:
                center = 1.0 if values.ndim == 1 and "norm" in name else 0.0
                values.copy_(center + 0.15 * torch.randn_like(values))
    theirs.save_pretrained(folder)
    return Pair(model, theirs, load_model(open_source(folder)))


def tokens(rows: int = 2, length: int = LENGTH) -> np.ndarray:
    """Draw token ids, none of them special."""
    return np.random.default_rng(0).integers(3, VOCABULARY, (rows, length), np.int32)


def difference(found: Any, expected: Any) -> float:
    """Give the largest difference over the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _run(model: Transformer, ids: Array, **about: Any) -> Any:
    hidden = model(ids, **about)
    return model.logits(hidden.value)[..., :VOCABULARY], hidden


_forward = nnx.jit(_run)


def _theirs(pair: Pair, ids: np.ndarray, **about: Any) -> Any:
    with torch.no_grad():
        return pair.theirs(torch.tensor(ids).long(), **about)


def prefill(pair: Pair) -> dict[str, float]:
    """Compare the logits of whole rows."""
    found, _ = _forward(pair.ours, jnp.asarray(tokens()))
    return {"prefill": difference(found, _theirs(pair, tokens()).logits)}


def padded(pair: Pair) -> dict[str, float]:
    """Compare rows of which one is padded on the left, one on the right."""
    real = np.ones((2, LENGTH), np.int32)
    real[0, :PAD], real[1, -PAD:] = 0, 0
    at = np.maximum(np.cumsum(real, axis=1) - 1, 0).astype(np.int32)
    mask, where = torch.tensor(real), torch.tensor(at).long()
    expected = _theirs(pair, tokens(), attention_mask=mask, position_ids=where).logits
    about = {"positions": jnp.asarray(at), "segments": jnp.asarray(real)}
    found, _ = _forward(pair.ours, jnp.asarray(tokens()), **about)
    live = real == 1
    return {"padded": difference(np.asarray(found)[live], expected.numpy()[live])}


def decode(pair: Pair) -> dict[str, float]:
    """Compare logits of a prompt and of tokens read one by one, both with caches."""
    ids, cut = tokens(), LENGTH // 2
    answer = _theirs(pair, ids[:, :cut], use_cache=True)
    caches = pair.ours.empty_caches(2, 128)
    logits, hidden = _forward(pair.ours, jnp.asarray(ids[:, :cut]), caches=caches)
    worst = difference(logits, answer.logits)
    for t in range(cut, LENGTH):
        step = ids[:, t : t + 1]
        kept = {"cache": answer.cache, "use_cache": True}
        answer = _theirs(pair, step, **kept)
        logits, hidden = _forward(pair.ours, jnp.asarray(step), caches=hidden.caches)
        worst = max(worst, difference(logits, answer.logits))
    return {"decode": worst}


def router(pair: Pair) -> dict[str, Any]:
    """Compare how each layer scores the experts, which it takes, and their weights."""
    seen: list[tuple[np.ndarray, ...]] = []

    def keep(_module: Any, _given: Any, answer: Any) -> None:
        seen.append(tuple(x.numpy() for x in answer))

    routers = [
        module
        for module in pair.theirs.modules()
        if type(module).__name__.endswith("Router")
    ]
    if not routers:
        return {"scores": "", "router": "", "same": ""}
    hooks = [module.register_forward_hook(keep) for module in routers]
    _theirs(pair, tokens())
    for hook in hooks:
        hook.remove()
    _, hidden = _forward(pair.ours, jnp.asarray(tokens()))
    scores, weights, experts = (
        np.asarray(hidden.metrics[f"moe/evidence/{name}"])
        for name in ("scores", "weights", "experts")
    )
    logits = np.stack([theirs for theirs, _, _ in seen])
    count = scores.shape[-1]
    mine = _spread(weights, experts, count)
    other = np.stack([_spread(paid, taken, count) for _, paid, taken in seen])
    same = ((mine != 0) == (other != 0)).all()
    return {
        "scores": difference(scores, logits),
        "router": difference(mine, other),
        "same": "yes" if same else "no",
    }


def _spread(weights: np.ndarray, experts: np.ndarray, count: int) -> np.ndarray:
    """Give every expert its weight, 0 where it is not visited."""
    whole = np.zeros((*weights.shape[:-1], count), np.float32)
    np.put_along_axis(whole, experts, weights, axis=-1)
    return whole


def gradient(pair: Pair) -> dict[str, float]:
    """Compare the gradients of the mean loss of all next tokens, parameter by one."""
    ids = torch.tensor(tokens()).long()
    pair.theirs.zero_grad()
    logits = pair.theirs(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1)
    )
    loss.backward()
    graph, params, rest = nnx.split(pair.ours, nnx.Param, ...)

    @jax.jit
    def mine(params: Any) -> Any:
        def mean(params: Any) -> Array:
            scores, _ = _run(nnx.merge(graph, params, rest), jnp.asarray(tokens()))
            scores = jax.nn.log_softmax(scores[:, :-1])
            hit = jnp.asarray(tokens())[:, 1:, None]
            return -jnp.take_along_axis(scores, hit, axis=-1).mean()

        return jax.grad(mean)(params)

    found = leaves(mine(params))
    expected = _named_gradients(pair)
    family = FAMILIES[pair.name.partition(",")[0]]
    worst = 0.0
    for need in needs(pair.ours.config, VOCABULARY, family, params):
        for at, name in need.names.items():
            disk = expected(name).reshape(disk_shape(need.tensor.layout, need.sizes))
            target = ours(disk, need.tensor, need.axes, need.sizes)
            own = np.asarray(found[need.path][at])
            own = own[tuple(slice(0, n) for n in target.shape)]
            scale = max(np.abs(target).max(), 1e-6)
            worst = max(worst, float(np.abs(own - target).max() / scale))
    return {"gradient": worst}


def _named_gradients(pair: Pair) -> Callable[[str], np.ndarray]:
    """Find a gradient by its name on disk; in memory experts are fused."""
    held = {
        n: p.grad.numpy()
        for n, p in pair.theirs.named_parameters()
        if p.grad is not None
    }

    def find(name: str) -> np.ndarray:
        if name in held:
            return np.ascontiguousarray(held[name])
        before, _, rest = name.partition(".experts.")
        expert, kind, _ = rest.split(".")
        fused = before.replace("block_sparse_moe", "mlp") + ".experts."
        if kind in ("down_proj", "w2"):
            return np.ascontiguousarray(held[f"{fused}down_proj"][int(expert)])
        both = np.split(held[f"{fused}gate_up_proj"][int(expert)], 2)
        return np.ascontiguousarray(both[kind in ("up_proj", "w3")])

    def either(name: str) -> np.ndarray:
        other = name.replace("block_sparse_moe.gate.", "mlp.gate.")
        return find(name if name in held else other)

    return either


def back(pair: Pair) -> dict[str, float]:
    """Compare the logits of what is written here and read there."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        export(pair.ours, out, family=pair.name.partition(",")[0])
        again, said = transformers.AutoModelForCausalLM.from_pretrained(
            out, output_loading_info=True, attn_implementation="eager"
        )
    wrong = {key: names for key, names in said.items() if names}
    if wrong:
        raise ValueError(f"{pair.name}: transformers says {wrong} of what was written")
    other = pair._replace(theirs=again.eval())
    expected = _theirs(pair, tokens()).logits
    return {"export": difference(_theirs(other, tokens()).logits, expected)}


CHECKS = (prefill, padded, decode, router, gradient, back)


def rows(models: list[str]) -> Iterator[dict[str, Any]]:
    """Compare everything of some models."""
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            pair = drawn(model, Path(folder))
            found: dict[str, Any] = {"model": model}
            for check in CHECKS:
                found |= check(pair)
        yield {
            key: f"{x:.1e}" if isinstance(x, float) else x for key, x in found.items()
        }


def main(argv: list[str]) -> int:
    """Compare all, write ``results/interop.csv`` and print it."""
    about = provenance() | {"transformers": transformers.__version__}
    found = []
    for row in rows(argv or list(MODELS)):
        found.append(row | about)
        write_rows("interop", found)
    sys.stdout.write(markdown(found, COLUMNS) + "\n")
    return 0
