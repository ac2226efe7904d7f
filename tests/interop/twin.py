"""The forward pass of all families once more: float64, loops, their own names.

Nothing of the package is used: configs and tensors are read as a checkpoint has them.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rates(config, width):
    """Radians a position, by channel pair, and the amplitude of the rotation."""
    spelled = config.get("rope_parameters") or {}
    theta = spelled.get("rope_theta", config["rope_theta"])
    scaling = config.get("rope_scaling") or {}
    rate = theta ** (-np.arange(0, width, 2) / width)
    if not scaling:
        return rate, 1.0
    factor, trained = scaling["factor"], scaling["original_max_position_embeddings"]
    kind = scaling.get("rope_type") or scaling["type"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = trained * rate / (2 * np.pi)
        mixed = (turns - low) / (high - low)
        slow = (1 - mixed) * rate / factor + mixed * rate
        slow = np.where(turns < low, rate / factor, slow)
        return np.where(turns > high, rate, slow), 1.0
    assert kind == "yarn"
    assert not scaling["truncate"]

    def channel(turns):
        whole = np.log(trained / (turns * 2 * np.pi)) / (2 * np.log(theta))
        return width * whole

    first = max(channel(scaling["beta_fast"]), 0)
    last = min(channel(scaling.get("beta_slow", 1.0)), width - 1)
    ramp = np.clip((np.arange(width // 2) - first) / (last - first), 0, 1)
    rate = rate / factor * ramp + rate * (1 - ramp)
    amplitude = growth(config, "mscale")
    return rate, amplitude / growth(config, "mscale_all_dim", 0)


def growth(config, name, silent=1):
    """How much yarn makes of what it multiplies, by one of its arguments."""
    scaling = config.get("rope_scaling") or {}
    return 1 + 0.1 * scaling.get(name, silent) * np.log(scaling.get("factor", 1))


class Twin:
    """A checkpoint's model; ``logits(tokens)`` of one sequence."""

    def __init__(self, config, tensors):
        self.config = config
        self.tensors = {k: np.asarray(v, np.float64) for k, v in tensors.items()}
        self.heads = config["num_attention_heads"]
        self.width = config.get("head_dim") or config["hidden_size"] // self.heads
        self.kind = config["architectures"][0].removesuffix("ForCausalLM")

    def norm(self, x, name, epsilon=None):
        square = (x * x).mean(-1, keepdims=True)
        epsilon = epsilon or self.config["rms_norm_eps"]
        return x / np.sqrt(square + epsilon) * self.tensors[name]

    def linear(self, x, name):
        return x @ self.tensors[f"{name}.weight"].T + self.tensors.get(
            f"{name}.bias", 0
        )

    def rotated(self, x):
        rate, amplitude = rates(self.config, self.width)
        angle = np.arange(len(x))[:, None, None] * rate
        cos, sin = amplitude * np.cos(angle), amplitude * np.sin(angle)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def projected(self, x, at, letter):
        y = self.linear(x, f"{at}{letter}_proj")
        name = f"{at}{letter}_norm.weight"
        if self.kind == "Olmoe" and letter != "v":
            y = self.norm(y, name)
        y = y.reshape(len(x), -1, self.width)
        if self.kind != "Olmoe" and name in self.tensors:
            y = self.norm(y, name)
        return y if letter == "v" else self.rotated(y)

    def latent(self, x, at):
        """Queries, keys and values of latent attention, head by head."""
        config, heads = self.config, self.heads
        plain, rank = config["qk_nope_head_dim"], config["kv_lora_rank"]
        if config["q_lora_rank"] is None:
            q = self.linear(x, f"{at}q_proj")
        else:
            q = self.linear(x, f"{at}q_a_proj")
            q = self.linear(
                self.norm(q, f"{at}q_a_layernorm.weight", 1e-6), f"{at}q_b_proj"
            )
        q = q.reshape(len(x), heads, -1)
        both = self.linear(x, f"{at}kv_a_proj_with_mqa")
        narrow = self.norm(both[:, :rank], f"{at}kv_a_layernorm.weight", 1e-6)
        kv = self.linear(narrow, f"{at}kv_b_proj").reshape(len(x), heads, -1)
        key = np.repeat(self.turned(both[:, None, rank:]), heads, axis=1)
        q = np.concatenate([q[..., :plain], self.turned(q[..., plain:])], -1)
        k = np.concatenate([kv[..., :plain], key], -1)
        return q * growth(config, "mscale_all_dim", 0) ** 2, k, kv[..., plain:]

    def turned(self, x):
        """Rotate pairs: of neighbours in DeepSeek-V2, and by default in V3."""
        apart = self.config.get("rope_interleave", True)
        rate, amplitude = rates(self.config, x.shape[-1])
        a, b = (x[..., ::2], x[..., 1::2]) if apart else np.split(x, 2, axis=-1)
        turn = amplitude * np.exp(1j * np.arange(len(x))[:, None, None] * rate)
        z = (a + 1j * b) * turn
        return np.concatenate([z.real, z.imag], -1)

    def window(self, layer):
        size = self.config.get("sliding_window")
        kinds = self.config.get("layer_types")
        listed = kinds and kinds[layer] == "full_attention"
        return None if listed else size

    def attention(self, x, layer):
        at = f"model.layers.{layer}.self_attn."
        if f"{at}kv_b_proj.weight" in self.tensors:
            q, k, v = self.latent(x, at)
        else:
            q, k, v = (self.projected(x, at, letter) for letter in "qkv")
        i, j = np.arange(len(x))[:, None], np.arange(len(x))[None]
        live = j <= i
        if self.window(layer):
            live &= j > i - self.window(layer)
        out = np.zeros((*q.shape[:2], v.shape[2]))
        for h in range(self.heads):
            g = h // (self.heads // k.shape[1])
            scores = q[:, h] @ k[:, g].T / np.sqrt(q.shape[2])
            scores = np.where(live, scores, -np.inf)
            if f"{at}sinks" in self.tensors:
                sink = np.full((len(x), 1), self.tensors[f"{at}sinks"][h])
                out[:, h] = softmax(np.hstack([scores, sink]))[:, :-1] @ v[:, g]
            else:
                out[:, h] = softmax(scores) @ v[:, g]
        return self.linear(out.reshape(len(x), -1), f"{at}o_proj")

    def gated(self, x, at, names=("gate_proj", "up_proj", "down_proj")):
        gate, up, down = (f"{at}{name}" for name in names)
        return self.linear(silu(self.linear(x, gate)) * self.linear(x, up), down)

    def expert(self, x, at, e):
        if self.kind == "GptOss":
            both = x @ self.tensors[f"{at}experts.gate_up_proj"][e]
            both = both + self.tensors[f"{at}experts.gate_up_proj_bias"][e]
            gate = np.minimum(both[..., 0::2], 7)
            up = np.clip(both[..., 1::2], -7, 7)
            hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
            out = hidden @ self.tensors[f"{at}experts.down_proj"][e]
            return out + self.tensors[f"{at}experts.down_proj_bias"][e]
        names = ("w1", "w3", "w2") if self.kind == "Mixtral" else None
        where = f"{at}experts.{e}."
        return self.gated(x, where, names) if names else self.gated(x, where)

    def chosen(self, x, at):
        """Experts and weights of one token."""
        config, k = self.config, self.config["num_experts_per_tok"]
        logits = self.linear(x, f"{at}router" if self.kind == "GptOss" else f"{at}gate")
        if self.kind == "GptOss":
            best = np.argsort(-logits)[:k]
            return best, softmax(logits[best])
        if self.kind in ("Dots1", "DeepseekV3"):
            scores = 1 / (1 + np.exp(-logits))
            choice = scores + self.tensors[f"{at}gate.e_score_correction_bias"]
            best = self.grouped(choice, judged_by=2)[:k]
            weights = scores[best] / scores[best].sum()
            return best, weights * config["routed_scaling_factor"]
        scores = softmax(logits)
        if self.kind == "DeepseekV2":
            best = self.grouped(scores, judged_by=1)[:k]
            return best, scores[best] * config["routed_scaling_factor"]
        best = np.argsort(-scores)[:k]
        whole = self.kind == "Mixtral" or config["norm_topk_prob"]
        return best, scores[best] / (scores[best].sum() if whole else 1)

    def grouped(self, choice, judged_by):
        """Experts of the best groups, the best first."""
        groups = choice.copy().reshape(self.config["n_group"], -1)
        worth = np.sort(groups, axis=1)[:, -judged_by:].sum(1)
        for group in np.argsort(-worth)[self.config["topk_group"] :]:
            groups[group] = -np.inf
        return np.argsort(-groups.reshape(-1))

    def feed_forward(self, x, layer):
        at = f"model.layers.{layer}.mlp."
        if self.kind == "Mixtral":
            at = f"model.layers.{layer}.block_sparse_moe."
        if f"{at}gate_proj.weight" in self.tensors:
            return self.gated(x, at)
        out = np.zeros_like(x)
        for t, token in enumerate(x):
            for e, weight in zip(*self.chosen(token, at), strict=True):
                out[t] += weight * self.expert(token, at, e)
        if f"{at}shared_experts.up_proj.weight" in self.tensors:
            out += self.gated(x, f"{at}shared_experts.")
        return out

    def logits(self, tokens):
        x = self.tensors["model.embed_tokens.weight"][tokens]
        for layer in range(self.config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            x = x + self.attention(self.norm(x, f"{at}input_layernorm.weight"), layer)
            name = f"{at}post_attention_layernorm.weight"
            x = x + self.feed_forward(self.norm(x, name), layer)
        tied = self.config["tie_word_embeddings"]
        head = "model.embed_tokens" if tied else "lm_head"
        return self.norm(x, "model.norm.weight") @ self.tensors[f"{head}.weight"].T
