import errno
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


def test_content_is_verified(folder):
    url = storage.join(folder, "a.bin")
    storage.write_bytes(url, b"data")
    assert storage.read_verified(url, storage.sha256(b"data")) == b"data"
    with pytest.raises(ValueError, match=rf"{url} has sha256 {storage.sha256(b'data')[:16]}…") as error:
        storage.read_verified(url, storage.sha256(b"other"))
    assert storage.sha256(b"other")[:16] in str(error.value)
    with pytest.raises(FileNotFoundError):
        storage.read_verified(url + "x", storage.sha256(b"data"))


def test_blocks_are_read_like_a_file(folder):
    data = bytes(range(256)) * 10
    url = storage.join(folder, "a.bin")
    storage.write_bytes(url, data)
    with storage.open_blocks(url, 100) as file:
        assert file.read(3) == data[:3]
        assert file.seek(-5, os.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.seek(95) == 95
        assert file.read(210) == data[95:305]
        assert file.seek(-5, os.SEEK_CUR) == 300
        assert file.read(400) == data[300:700]
        file.seek(len(data) + 1)
        assert file.read(1) == b""


def test_what_the_user_configured_goes_before_our_settings(monkeypatch):
    ours = storage.options("s3://bucket/a")["config_kwargs"]
    assert ours["read_timeout"] == storage.STALL
    assert ours["retries"]["total_max_attempts"] == storage.ATTEMPTS
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 60}})
    found = storage.options("s3://bucket/a")["config_kwargs"]
    assert found == ours | {"read_timeout": 60}
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    assert "retries" not in storage.options("s3://bucket/a")["config_kwargs"]
    assert storage.options("/local/path") == {"use_listings_cache": False}
    assert storage.locate("s3://bucket/a")[0].config_kwargs["read_timeout"] == 60


def test_paths_join_and_become_absolute(tmp_path, monkeypatch):
    assert storage.join("s3://bucket/run/", "store", "a.json") == "s3://bucket/run/store/a.json"
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/x") == str(tmp_path / "runs/x")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"


@pytest.mark.parametrize("call", [storage.names, storage.remove_file, storage.remove_folder])
def test_a_local_disk_that_fails_is_not_asked_again(tmp_path, call):
    with pytest.raises(OSError, match="too long") as error:
        call(str(tmp_path / ("x" * 300)))
    assert error.value.errno == errno.ENAMETOOLONG
