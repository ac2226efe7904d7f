"""An experiment: every section of a config, and the rules that join them."""

from dataclasses import dataclass, field

from sparsejax.config import require
from sparsejax.data import DataConfig
from sparsejax.masked import MaskedConfig
from sparsejax.nn import ModelConfig
from sparsejax.sharding import MeshConfig
from sparsejax.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run is, and how often it says, checks and keeps something.

    ``loss_chunk`` is the number of tokens whose logits exist at a time (0: all).
    ``z_loss`` weights the squared log-normaliser. ``keep`` newest and ``keep_best``
    best checkpoints stay on disk: best are those of the least held-out loss, among the
    ones that were evaluated at their own step.
    """

    steps: int
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 16
    save_every: int = 100
    keep: int = 2
    keep_best: int = 1
    z_loss: float = 0.0
    loss_chunk: int = 0
    prompt: str = "The "
    sample_tokens: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "eval_every", "eval_batches", "save_every"):
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive")
        require(self.keep > 0, "keep", self.keep, "must keep at least the newest")
        for name in ("keep_best", "z_loss", "loss_chunk", "sample_tokens"):
            value = getattr(self, name)
            require(value >= 0, name, value, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run; equal configs give equal runs."""

    seed: int = 0
    data: DataConfig
    model: ModelConfig
    masked: MaskedConfig | None = None
    optim: OptimConfig
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**31, "seed", self.seed, "must be in [0, 2**31)")
        length = self.data.seq_len
        for name in ("block_q", "block_kv"):
            block = getattr(self.model.attention, name)
            require(
                length % block == 0,
                "data.seq_len",
                length,
                f"must be divisible by model.attention.{name}={block}",
            )
        context = self.model.context_length
        require(
            context is None or length <= context,
            "data.seq_len",
            length,
            f"must not exceed model.context_length={context}",
        )
        accumulate, batch = self.optim.accumulate, self.data.batch_size
        require(
            batch % accumulate == 0,
            "optim.accumulate",
            accumulate,
            f"must divide data.batch_size={batch}",
        )
        chunk = self.train.loss_chunk
        require(
            chunk == 0 or length % chunk == 0,
            "train.loss_chunk",
            chunk,
            f"must divide data.seq_len={length}",
        )
        warmup, steps = self.optim.warmup, self.train.steps
        require(
            warmup <= steps,
            "optim.warmup",
            warmup,
            f"must not exceed train.steps={steps}",
        )
        self._check_masked()

    def _check_masked(self) -> None:
        """Refuse masks beside what they exclude, or that come after the end."""
        if self.masked is None:
            return
        require(
            self.optim.lora is None,
            "optim.lora",
            self.optim.lora,
            "adds to every weight of a matrix, and masks keep some at zero; set it, or"
            " masked, to none",
        )
        steps = self.train.steps
        for name in ("end", "dense_from"):
            value = getattr(self.masked, name) or 0
            require(
                value < steps,
                f"masked.{name}",
                value,
                f"must be one of the steps 0 to {steps - 1} of train.steps={steps}",
            )


# What may differ between two runs in one workdir: it changes no number of a step.
FREE = (
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.keep",
    "train.keep_best",
    "train.prompt",
    "train.sample_tokens",
    "mesh",
)
