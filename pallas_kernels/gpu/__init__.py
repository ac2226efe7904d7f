"""Block-sparse attention on Hopper GPUs, in Pallas Mosaic GPU."""

from pallas_kernels.gpu.backward import key_gradients, query_gradient
from pallas_kernels.gpu.forward import forward
from pallas_kernels.gpu.interpreter import interpreted, is_interpreted
from pallas_kernels.gpu.rule import Rule, Score
from pallas_kernels.gpu.skeleton import Lists, Plan

__all__ = [
    "Lists",
    "Plan",
    "Rule",
    "Score",
    "forward",
    "interpreted",
    "is_interpreted",
    "key_gradients",
    "query_gradient",
]
