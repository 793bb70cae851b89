import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from cellray.train import lease
from cellray.train.ending import Stopped
from tests import proxy
from tests.conftest import ROOT

BEAT, EXPIRY = 0.2, 2.0


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "BEAT", BEAT)
    monkeypatch.setattr(lease, "EXPIRY", EXPIRY)


def held(run, said=None, lost=None, stop=None):
    say = (said if said is not None else []).append
    return lease.held(str(run), say, stop=stop or threading.Event(), lost=lost or threading.Event())


def files(run):
    fs, path = lease.storage.locate(lease.storage.join(str(run), "drivers"))
    return {os.path.basename(name): json.loads(fs.cat_file(name)) for name in fs.ls(path, detail=False)}


@contextmanager
def driver(run, *, beat=BEAT, expiry=EXPIRY, **environment):
    """Another process that drives the run."""
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-m", "tests.lease_driver", str(run), str(beat), str(expiry)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_the_second_driver_is_refused_at_once_and_told_who_is_there(tmp_path):
    with held(tmp_path):
        begun = time.monotonic()
        with pytest.raises(ValueError, match="is being trained by") as error, held(tmp_path):
            pytest.fail("two drivers")
        assert time.monotonic() - begun < 1
    (facts,) = files(tmp_path).values()
    for part in (str(tmp_path), f"process {os.getpid()}", facts["host"], facts["since"], "run=…", "kill"):
        assert part in str(error.value)


def test_a_driver_that_ended_makes_room_at_once(tmp_path):
    for number in (1, 2, 3):
        said: list[str] = []
        with held(tmp_path, said):
            assert list(files(tmp_path)) == [f"{number:06d}.json"]
        assert said == []


def test_a_driver_elsewhere_that_lives_is_told_by_its_beat(tmp_path, monkeypatch):
    with held(tmp_path):
        monkeypatch.setattr(lease, "_machine", lambda: "another")
        said: list[str] = []
        begun = time.monotonic()
        with pytest.raises(ValueError, match="is being trained by"), held(tmp_path, said):
            pytest.fail("two drivers")
        assert time.monotonic() - begun < EXPIRY
    assert "waiting up to 2 s" in said[0]


def test_a_driver_elsewhere_that_died_makes_room_after_a_while(tmp_path):
    with held(tmp_path):
        facts = files(tmp_path)["000001.json"]
    lease._write(str(tmp_path / "drivers"), 1, facts | {"machine": "another", "host": "far"})
    said: list[str] = []
    begun = time.monotonic()
    with held(tmp_path, said):
        assert EXPIRY <= time.monotonic() - begun < 2 * EXPIRY
        assert list(files(tmp_path)) == ["000002.json"]
    assert "on far" in said[0]


def test_who_waits_for_a_dead_driver_can_be_told_to_end(tmp_path):
    with held(tmp_path):
        facts = files(tmp_path)["000001.json"]
    lease._write(str(tmp_path / "drivers"), 1, facts | {"machine": "another"})
    stop = threading.Event()
    stop.set()
    begun = time.monotonic()
    with pytest.raises(Stopped), held(tmp_path, stop=stop):
        pytest.fail("it was told to end")
    assert time.monotonic() - begun < EXPIRY / 2


def test_a_driver_whose_process_id_is_used_again_is_dead(tmp_path):
    with held(tmp_path):
        facts = files(tmp_path)["000001.json"]
    lease._write(str(tmp_path / "drivers"), 1, facts | {"started": "1"})
    begun = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - begun < 1


def test_who_was_overtaken_is_told(tmp_path):
    lost = threading.Event()
    with held(tmp_path, lost=lost):
        facts = files(tmp_path)["000001.json"]
        assert lease.storage.write_once(str(tmp_path / "drivers" / "000002.json"), json.dumps(facts).encode())
        assert lost.wait(10)
    assert "released" not in files(tmp_path)["000002.json"]


def test_a_store_that_is_slow_when_a_driver_ends_still_hears_of_it(tmp_path, monkeypatch):
    """Else nobody but a new process could ever train the run again."""
    begun, answer, write = threading.Event(), threading.Event(), lease._write

    def slow(*facts):
        begun.set()
        assert answer.wait(20)
        write(*facts)

    monkeypatch.setattr(lease, "PATIENCE", 0.1)
    with held(tmp_path):
        monkeypatch.setattr(lease, "_write", slow)
        assert begun.wait(10)
    assert "released" not in files(tmp_path)["000001.json"]
    answer.set()
    until = time.monotonic() + 10
    while not files(tmp_path)["000001.json"].get("released"):
        assert time.monotonic() < until
        time.sleep(0.01)
    with held(tmp_path):
        assert list(files(tmp_path)) == ["000002.json"]


def race(run, rounds, drivers=8):
    """Many come at once after one that died elsewhere; the number of those that drive at a time, at most."""
    most, now, lock, winners = 0, 0, threading.Lock(), []

    def come(who):
        nonlocal most, now
        try:
            with held(run):
                with lock:
                    now += 1
                    most = max(most, now)
                time.sleep(3 * BEAT)
                with lock:
                    now -= 1
                    winners.append(who)
        except ValueError:
            return

    for _ in range(rounds):
        with ThreadPoolExecutor(drivers) as pool:
            list(pool.map(come, range(drivers)))
    assert len(winners) >= rounds
    return most


def test_of_eight_that_come_at_once_one_drives(tmp_path):
    assert race(tmp_path, 2) == 1


@pytest.mark.slow
def test_of_eight_that_come_at_once_one_drives_fifty_times(tmp_path):
    assert race(tmp_path, 50) == 1


def trial(run, **environment):
    """A second process is refused; when the first is killed, the third goes on soon."""
    with driver(run, **environment) as first:
        assert first.stdout.readline() == "driving\n"
        with driver(run, **environment) as second:
            assert second.stdout.readline().startswith(
                f"refused {run} is being trained by process {first.pid}"
            )
            assert second.wait(20) == 2
        first.send_signal(signal.SIGKILL)
        first.wait()
        begun = time.monotonic()
        with held(run):
            return time.monotonic() - begun


def test_a_killed_driver_does_not_hold_up_its_successor(tmp_path):
    assert trial(tmp_path) < EXPIRY


@pytest.mark.slow
def test_ten_of_ten_second_drivers_are_refused(tmp_path):
    waits = [trial(tmp_path) for _ in range(10)]
    print(f"\n10 of 10; seconds until the successor drove: {max(waits):.2f} at most")
    assert max(waits) < EXPIRY


def test_in_a_bucket_one_drives_and_an_outage_does_not_end_it(tmp_path):
    with (
        proxy.object_store() as upstream,
        proxy.proxy(upstream) as server,
        proxy.pointed(server.server_port, read_timeout=0.5),
    ):
        lease.storage.locate("s3://runs")[0].mkdir("runs")
        assert race("s3://runs/a", 1, drivers=4) == 1
        lost = threading.Event()
        with held("s3://runs/b", lost=lost):
            server.plan = proxy.Plan(1.0, {"error": 1}, limit=2)
            with pytest.raises(ValueError, match="s3://runs/b is being trained by"), held("s3://runs/b"):
                pytest.fail("two drivers")
            time.sleep(3 * BEAT)
            server.plan = None
            assert not lost.is_set()
        with held("s3://runs/b"):
            assert list(files("s3://runs/b")) == ["000002.json"]
