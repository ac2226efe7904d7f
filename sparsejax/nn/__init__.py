"""Models composed of the families."""

from sparsejax.nn.compact import by_fan_in, compact
from sparsejax.nn.config import GatedConfig, LayerSpec, ModelConfig
from sparsejax.nn.refresh import refreshed
from sparsejax.nn.transformer import Hidden, Transformer

__all__ = [
    "GatedConfig",
    "Hidden",
    "LayerSpec",
    "ModelConfig",
    "Transformer",
    "by_fan_in",
    "compact",
    "refreshed",
]
