"""A Ray cluster of two nodes on this machine, one of which is killed."""

import contextlib
import threading


@contextlib.contextmanager
def two_nodes(*, kill_after):
    """Give the address; the second node dies after so many seconds."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    timer = threading.Timer(
        kill_after, cluster.remove_node, (second,), {"allow_graceful": False}
    )
    timer.start()
    try:
        yield cluster.address
    finally:
        timer.join()
        cluster.shutdown()
