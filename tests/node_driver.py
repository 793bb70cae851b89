"""`python -m tests.node_driver RUN KILLS [key=value …]`: a training on a cluster whose nodes die under it.

A head without CPUs and two nodes with one each, all on this machine, so that each node has one of two
workers. KILLS times, when a checkpoint was saved since, a node is killed with all that runs on it; some
seconds later there is another one.
"""

import os
import random
import sys
import tempfile
import threading

from cellray import cluster

cluster.prepare("local")


def main() -> int:
    import ray
    from ray.cluster_utils import Cluster

    from cellray.train.loop import train
    from cellray.train.recipe import settings
    from tests import stores

    folder, kills, *words = sys.argv[1:]
    recipe = stores.run(folder, **settings(words)).recipe
    left, saved, over, draw = int(kills), threading.Event(), threading.Event(), random.Random(0)
    small = {"object_store_memory": 128 << 20, "include_dashboard": False}
    with tempfile.TemporaryDirectory(prefix="nodes-") as scratch:
        # Where Ray writes down which cluster was started last: not where others would look for theirs.
        os.environ["RAY_TMPDIR"] = scratch
        os.mkdir(os.path.join(scratch, "ray"))
        head = {"num_cpus": 0, "temp_dir": scratch, **small}
        found = Cluster(initialize_head=True, connect=False, shutdown_at_exit=False, head_node_args=head)
        nodes = [found.add_node(num_cpus=1, object_store_memory=128 << 20) for _ in range(2)]
        ray.init(address=found.address, log_to_driver=False)

        def kill() -> None:
            for _ in range(left):
                saved.clear()
                while not saved.wait(0.1):
                    if over.is_set():
                        return
                number = draw.randrange(2)
                found.remove_node(nodes[number], allow_graceful=False)
                print("killed a node", flush=True)
                over.wait(3)
                nodes[number] = found.add_node(num_cpus=1, object_store_memory=128 << 20)

        def emit(event: dict) -> None:
            if "saved" in event:
                saved.set()
            for name in ("resumed", "warning"):
                if name in event:
                    print(name, event["stage"], event[name], flush=True)

        thread = threading.Thread(target=kill)
        thread.start()
        try:
            train(recipe, emit)
        finally:
            over.set()
            thread.join()
            ray.shutdown()
            found.shutdown()
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
