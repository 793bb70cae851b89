"""`python -m tests.train_worker RUN [key=value …]`: a training in one process, without Ray.

A SIGTERM ends it as it ends `pipelines.pretrain`.
"""

import sys
import time

import torch

from cellray.train.chain import chain
from cellray.train.ending import TERMINATED, Stopped, on_terminate
from cellray.train.recipe import settings
from cellray.train.run import Run
from tests import stores


def main() -> int:
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    run = stores.run(folder, **settings(words))

    def emit(event: dict) -> None:
        if "resumed" in event:
            print(f"resumed {event['stage']} {event['resumed']}", flush=True)

    with on_terminate() as told:
        print("begun", flush=True)
        try:
            chain(Run(run.recipe), emit, "cpu", told)
        except Stopped:
            print(f"stopped {time.time()}", flush=True)
            return TERMINATED
    print("done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
