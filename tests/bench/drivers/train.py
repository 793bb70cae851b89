"""The feed inside a Ray Train worker that does nothing but iterate it."""

import os
import sys
import tempfile
from typing import Any

from cellray import cluster


def worker(config: dict[str, Any]) -> None:
    """Answers in place of the driver, through the driver's own pipes."""
    from tests.bench.drivers.feed import WINDOW, Bare
    from tests.bench.harness.serve import serve

    bare = Bare(config["store"])
    with open(config["commands"]) as commands, open(config["answers"], "w") as answers:
        serve(bare.deliveries, commands=commands, answers=answers, window=WINDOW)


def main() -> None:
    own = f"/proc/{os.getpid()}/fd"
    answers = os.dup(1)
    os.dup2(2, 1)
    cluster.prepare("local")
    with (
        cluster.connect("local", cpus=2, object_store_bytes=256 << 20),
        tempfile.TemporaryDirectory(prefix="cellray-bench-") as scratch,
    ):
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            worker,
            train_loop_config={"store": sys.argv[1], "commands": f"{own}/0", "answers": f"{own}/{answers}"},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="bench", storage_path=scratch),
        ).fit()


if __name__ == "__main__":
    main()
