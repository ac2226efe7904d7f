"""Which hardware a program is being written for."""

import jax

__all__ = ["platform"]

KINDS = {"TPU": "tpu", "NVIDIA": "gpu"}


def platform() -> str:
    """``cpu``, ``gpu`` or ``tpu``: of the ambient mesh's devices, else the default.

    The ambient mesh may be of devices that are not there, for compiling ahead of time.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        return jax.default_backend()
    kind = str(device.device_kind)
    maker = kind.partition(" ")[0].rstrip("0123456789x")
    return KINDS.get(maker, kind)
