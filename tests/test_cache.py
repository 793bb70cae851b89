import multiprocessing
import os

import numpy as np
import pytest

from cellray.data.cache import Cache
from tests.crash import crashing

MB = 1 << 20


def piece(number, size=MB // 8):
    return bytes([number % 251]) * size


def is_good(number, size=MB // 8):
    return lambda data: data == piece(number, size)


def get(cache, number, size=MB // 8):
    """Piece `number`, and whether it had to be fetched."""
    fetched = []

    def fetch():
        fetched.append(number)
        return piece(number, size)

    assert cache.get(f"{number:04x}-0-sum", fetch, is_good(number, size)) == piece(number, size)
    return bool(fetched)


def test_a_piece_is_fetched_once(tmp_path):
    cache = Cache(str(tmp_path / "cache"), MB)
    assert get(cache, 1)
    assert not get(cache, 1)
    assert not get(Cache(str(tmp_path / "cache"), MB), 1)
    assert (cache.hits, cache.misses) == (1, 1)


def test_a_damaged_piece_is_fetched_again_and_replaced(tmp_path):
    cache = Cache(str(tmp_path), MB)
    get(cache, 1)
    (file,) = tmp_path.glob("??/*")
    for damaged in (b"", piece(1)[:-1], b"x" + piece(1)[1:]):
        file.write_bytes(damaged)
        assert get(cache, 1)
        assert not get(cache, 1)


def test_what_was_fetched_wrong_is_not_kept(tmp_path):
    cache = Cache(str(tmp_path), MB)
    assert cache.get("0001-0-sum", lambda: b"wrong", is_good(1)) == b"wrong"
    assert not list(tmp_path.glob("??/*"))
    assert get(cache, 1)


def test_the_limit_holds_and_what_was_used_last_stays(tmp_path):
    cache = Cache(str(tmp_path), MB)
    for number in range(40):
        get(cache, number)
        get(cache, 0)
        for file in tmp_path.glob("??/*"):
            # One tick of the clock each, as coarse file systems have it.
            os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 1))
        assert cache.size() <= MB
    assert not get(cache, 0)
    assert not get(cache, 39)
    assert get(cache, 1)


def test_a_piece_larger_than_the_limit_passes_through(tmp_path):
    cache = Cache(str(tmp_path), 1000)
    assert get(cache, 1, size=1001)
    assert get(cache, 1, size=1001)
    assert cache.size() == 0


def test_what_a_process_that_died_left_goes(tmp_path):
    cache = Cache(str(tmp_path), MB)
    get(cache, 0)
    left = tmp_path / "00" / "0007-0-sum.abc.part"
    left.write_bytes(bytes(MB))
    os.utime(left, (0, 0))
    (tmp_path / "total").unlink()
    get(cache, 1)
    assert not left.exists()
    assert cache.size() <= MB


def test_a_disk_that_is_full_at_any_call_is_no_error(tmp_path):
    with crashing(str(tmp_path)) as calls:
        assert get(Cache(str(tmp_path / "whole"), MB), 1)
    assert {"open", "write", "replace"} <= set(calls.names)
    for at in range(1, len(calls.names) + 1):
        folder = tmp_path / str(at)
        cache = Cache(str(folder), MB)
        with crashing(str(folder), at, full=True):
            assert get(cache, 1)
        assert not list(folder.glob("??/*.part"))


def test_a_limit_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing"):
        Cache(str(tmp_path), 0)


def _many(folder, seed, out):
    cache = Cache(folder, MB)
    rng = np.random.default_rng(seed)
    most = 0
    for number in rng.integers(0, 24, 150).tolist():
        get(cache, number)
        most = max(most, cache.size())
    out.put((cache.hits, most))


def test_processes_share_a_folder_and_its_limit(tmp_path):
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=_many, args=(str(tmp_path), seed, out)) for seed in range(3)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=100) for _ in workers]
    for worker in workers:
        worker.join(timeout=100)
        assert worker.exitcode == 0
    assert all(hits > 0 for hits, _ in found)
    # Written beside what it replaces: for a moment there is one piece more for each process.
    assert max(most for _, most in found) <= MB + 3 * MB // 8
