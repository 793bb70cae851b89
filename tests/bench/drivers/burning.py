"""A driver whose cost is known, for the tests: 0.01 CPU-seconds of another thread for each batch."""

import threading
import time
from collections.abc import Iterator

from tests.bench.harness.serve import Delivery, serve


def burn(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def deliveries() -> Iterator[Delivery]:
    for step in range(1_000):
        thread = threading.Thread(target=burn, args=(0.01,))
        thread.start()
        thread.join()
        print("what a library says is no answer")
        yield 10, 70, [step, step + 1]


def main() -> None:
    serve(deliveries, origins=list, window=4, about="a test")


if __name__ == "__main__":
    main()
