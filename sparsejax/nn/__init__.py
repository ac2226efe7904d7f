"""Models composed of the families."""

from sparsejax.nn.config import GatedConfig, LayerSpec, ModelConfig
from sparsejax.nn.transformer import Hidden, Transformer, rebalanced

__all__ = [
    "GatedConfig",
    "Hidden",
    "LayerSpec",
    "ModelConfig",
    "Transformer",
    "rebalanced",
]
