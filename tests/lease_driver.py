"""`python -m tests.lease_driver RUN`: drives a run until its input ends, and says what comes of it."""

import sys
import threading

from cellray.train import lease


def main() -> int:
    run, beat, expiry = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    lease.BEAT, lease.EXPIRY = beat, expiry
    try:
        never = threading.Event()
        with lease.held(run, lambda text: print(f"said {text}", flush=True), stop=never, lost=never):
            print("driving", flush=True)
            sys.stdin.read()
    except ValueError as error:
        print(f"refused {error}", flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
