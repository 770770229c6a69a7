"""Where the programs of a run run. One file and one line here for each kind of cluster; heavy imports wait until it is used."""

from __future__ import annotations

from spin.alignment.pipeline.clusters.base import Cluster, ClusterSettings, Usage
from spin.alignment.pipeline.clusters.local import LocalCluster
from spin.alignment.pipeline.clusters.ray_cluster import RayCluster
from spin.alignment.pipeline.clusters.slurm_cluster import SlurmCluster

# The names are those of launch.cluster.
CLUSTERS: dict[str, type[Cluster]] = {
    "local": LocalCluster,
    "ray": RayCluster,
    "slurm": SlurmCluster,
}

__all__ = ["CLUSTERS", "Cluster", "ClusterSettings", "Usage"]
