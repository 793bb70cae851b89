import os
import threading

import fsspec
import pytest

from cellray.data import storage


@pytest.fixture
def memory():
    yield "memory://bucket"
    fs = fsspec.filesystem("memory")
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path, memory):
    return str(tmp_path / "deep" / "down") if request.param == "local" else memory


def test_what_is_written_is_read(folder):
    url = storage.join(folder, "a", "b.bin")
    assert not storage.exists(url)
    storage.write_bytes(url, b"one")
    storage.write_bytes(url, b"two")
    assert storage.exists(url)
    assert storage.read_bytes(url) == b"two"


def test_only_the_first_writes_once(folder):
    url = storage.join(folder, "a.json")
    assert storage.write_once(url, b"one")
    assert not storage.write_once(url, b"two")
    assert storage.read_bytes(url) == b"one"


def test_of_writers_at_the_same_time_one_wins(tmp_path):
    url = str(tmp_path / "a.json")
    won = []

    def write(i):
        if storage.write_once(url, str(i).encode() * 1000):
            won.append(i)

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(url) == str(won[0]).encode() * 1000
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        storage.write_bytes(str(tmp_path / "folder"), b"data")
    assert os.listdir(tmp_path) == ["folder"]


def test_paths_join_and_become_absolute(tmp_path, monkeypatch):
    assert storage.join("s3://bucket/run/", "store", "a.json") == "s3://bucket/run/store/a.json"
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs/x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
