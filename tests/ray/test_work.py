import os
import signal

import pytest

from cellray.data.work import bound, execute

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray Data warns of its own defaults
]


def write(folder, name):
    (folder / name).write_text(name)


def refuse(folder):
    raise ValueError(f"{folder} holds no counts")


def crash(folder):
    os.kill(os.getpid(), signal.SIGSEGV)


def fail(folder):
    raise KeyError("a mistake of ours")


def test_every_call_is_done_and_says_what_it_could_not_take(tmp_path):
    calls = [bound(write, tmp_path, "a"), bound(refuse, tmp_path), bound(write, tmp_path, "b")]
    found = dict(execute(calls))
    assert found == {0: "", 1: f"{tmp_path} holds no counts", 2: ""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    assert list(execute([])) == []


def test_a_call_that_takes_its_process_down_fails_alone(tmp_path):
    names = [f"f{i}" for i in range(4)]
    calls = [bound(write, tmp_path, name) for name in names]
    found = dict(execute([*calls[:2], bound(crash, tmp_path), *calls[2:]]))
    assert "the process that read it ended twice" in found.pop(2)
    assert set(found.values()) == {""}
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_an_error_of_ours_is_not_taken_for_one_of_the_file(tmp_path):
    with pytest.raises(KeyError, match="a mistake of ours"):
        list(execute([bound(fail, tmp_path)]))
