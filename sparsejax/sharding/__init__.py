"""Meshes from a config, and shardings from parameters' letters."""

from sparsejax.sharding.mesh import MeshConfig, make_mesh, shardings

__all__ = ["MeshConfig", "make_mesh", "shardings"]
