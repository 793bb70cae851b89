import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import pytest
import ray

from cellray import cluster
from pipelines.ask import held_port

SHIPPED = """
import json, sys
sys.path[:0] = sys.argv[2].split(":")        # the driver's alone: Ray does not hand it to workers
from cellray import cluster

with cluster.connect(sys.argv[1], cpus=2, object_store_bytes=128 << 20):
    import ray

    @ray.remote
    def where():
        import subprocess, cellray, pipelines.recipes, serve, tune
        from cellray.data.tokens import Tokenizer
        environment = {k: v for k, v in __import__("os").environ.items() if k != "PYTHONPATH"}
        bare = subprocess.run(
            [sys.executable, "-c", "import ray, cellray"], env=environment, capture_output=True, text=True
        )
        modules = [cellray, pipelines.recipes, serve, tune, sys.modules[Tokenizer.__module__]]
        return [m.__file__ for m in modules], bare.stderr

    folder = ray._private.worker._global_node.get_temp_dir_path()
    print(json.dumps([*ray.get(where.remote()), folder]))
"""


LASTING = """
import time
from cellray import cluster

with cluster.connect("local", cpus=1, object_store_bytes=128 << 20):
    import ray

    print(ray._private.worker._global_node.get_temp_dir_path(), flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter with everything that is installed here except cellray."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    for entry in Path(ray.__file__).parent.parent.iterdir():
        if "cellray" not in entry.name:  # the library, or what an editable install leaves of it
            (packages / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def saw(bare_python, root, folder, address, environment):
    """What a task saw that a driver in `bare_python` sent: module files, errors, Ray's folder."""
    script = folder / "driver.py"
    script.write_text(SHIPPED)
    clean = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
    done = _run([bare_python, script, address, f"{root / 'platform'}:{root}"], clean, folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def local(bare_python, root, tmp_path_factory):
    """That of a local cluster."""
    return saw(bare_python, root, tmp_path_factory.mktemp("driver"), "local", dict(os.environ))


def test_tasks_on_this_machine_use_the_files_of_their_driver(local, root):
    files, without, _ = local
    assert all(Path(file).is_relative_to(root) for file in files), files
    assert "No module named 'cellray'" in without


def test_tasks_on_another_cluster_are_sent_the_library(remote, bare_python, root, tmp_path):
    address, environment = remote
    files, *_ = saw(bare_python, root, tmp_path, address, environment)
    assert all("/runtime_resources/py_modules_files/" in file for file in files), files


def test_a_local_cluster_leaves_no_files_and_no_processes(local):
    folder = local[-1]
    assert Path(folder).name.startswith("cellray-")
    assert not Path(folder).exists()
    commands = [_command(int(pid)) for pid in os.listdir("/proc") if pid.isdigit()]
    assert not [command for command in commands if folder in command]


def test_what_a_killed_driver_leaves_is_removed_by_the_next_one(short, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", os.environ["TMPDIR"])
    foreign = Path(tempfile.gettempdir(), "cellray-other")  # that of somebody who holds no lock in it
    foreign.mkdir()
    driver = subprocess.Popen([sys.executable, "-c", LASTING], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    try:
        folder = Path(driver.stdout.readline().strip())
        assert folder.parent == foreign.parent
        with cluster.scratch() as own:
            assert folder.is_dir()
            assert Path(own).is_dir()
    finally:
        driver.kill()
        driver.communicate()
    assert folder.is_dir()
    with cluster.scratch() as own:
        assert not folder.exists()
    assert not Path(own).exists()
    assert foreign.is_dir()


def test_temporary_files_go_where_the_user_says_however_long_its_path(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with cluster.scratch() as own:
        assert Path(own).parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_a_local_cluster_listens_on_loopback_alone(ray_session):
    ours = _descendants(os.getpid())
    listening = [(host, port) for host, port, pid in _listeners() if pid in ours]
    assert len(listening) >= 3, "this finds too little: Ray's own servers listen"
    assert {host for host, _ in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening


def test_a_local_cluster_demands_a_token(ray_session):
    token = os.environ["RAY_AUTH_TOKEN"]
    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        keys = channel.unary_unary("/ray.rpc.InternalKVGcsService/InternalKVKeys")
        for metadata in [(), (("authorization", f"Bearer {'0' * len(token)}"),)]:
            with pytest.raises(grpc.RpcError) as refused:
                keys(b"", metadata=metadata, timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert keys(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=5) is not None


def test_workers_are_told_their_threads(ray_session):
    @ray.remote
    def threads():
        return os.environ["OMP_NUM_THREADS"]

    assert ray.get(threads.remote()) == "1"


def test_a_connect_within_another_uses_the_same_cluster(ray_session):
    before = ray.get_runtime_context().gcs_address
    with cluster.connect("local"):
        assert ray.get_runtime_context().gcs_address == before
    assert ray.is_initialized()


@pytest.mark.parametrize("variables", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": "secret"}])
def test_an_address_without_a_token_is_refused_at_once(variables, monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begun = time.monotonic()
    with pytest.raises(ValueError, match="without a token"), cluster.connect("10.1.2.3:6379"):
        pass
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    with pytest.raises(ValueError, match="without a token"), cluster.connect():
        pass
    assert time.monotonic() - begun < 1


def test_an_address_where_nothing_answers_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    with held_port() as port:
        address = f"127.0.0.1:{port}"
        with (
            pytest.raises(ValueError, match=f"nothing answers at Ray address {address}"),
            cluster.connect(address),
        ):
            pass


@pytest.mark.parametrize("address", ["auto", "ray://head:10001", "head"])
def test_an_address_of_another_form_is_refused(address):
    with pytest.raises(ValueError, match="is not host:port"), cluster.connect(address):
        pass


def test_ray_imported_too_early_is_refused(tmp_path):
    code = "import ray\nfrom cellray import cluster\ncluster.prepare()"
    early = {k: v for k, v in os.environ.items() if k not in cluster.LOCAL}
    done = _run([sys.executable, "-c", code], early | {"PYTHONPATH": os.pathsep.join(sys.path)}, tmp_path)
    assert "Ray was imported before" in done.stderr


def test_a_ray_that_others_start_here_is_exposed_unless_its_settings_say_otherwise(monkeypatch):
    assert not cluster.exposed()
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    assert cluster.exposed()
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert not cluster.exposed()


JOIN = """
import sys
sys.path[:0] = sys.argv[2].split(":")
from cellray import cluster
try:
    with cluster.connect(sys.argv[1]):
        import ray, cellray
        print(ray.get(ray.remote(lambda: __import__("cellray").__version__).remote()) == cellray.__version__)
except ValueError as error:
    print(error)
"""


def _join(address, environment, root, folder):
    script = folder / "join.py"
    script.write_text(JOIN)
    done = _run([sys.executable, script, address, f"{root / 'platform'}:{root}"], environment, folder)
    return done.stdout.strip(), done.stderr


@pytest.mark.slow
def test_a_cluster_elsewhere_is_joined_with_its_token_alone(remote, root, tmp_path):
    address, environment = remote
    output, errors = _join(address, environment, root, tmp_path)
    assert output == "True", errors
    output, errors = _join(address, environment | {"RAY_AUTH_TOKEN": "wrong" * 13}, root, tmp_path)
    assert "its token may be another" in output, errors


def _run(command, environment, folder):
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""  # it ended meanwhile


def _descendants(pid):
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry))
    found, new = {pid}, [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found.update(new)
    return found


def _listeners():
    """(host, port, pid) of every listening TCP socket of processes that may be looked into."""
    owners: dict[str, int] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                links = [os.readlink(link) for link in Path(f"/proc/{entry}/fd").iterdir()]
            except OSError:
                continue
            owners |= {link[8:-1]: int(entry) for link in links if link.startswith("socket:[")}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            host, _, port = fields[1].partition(":")
            if fields[3] == "0A" and fields[9] in owners:
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                yield socket.inet_ntop(family, b"".join(words)), int(port, 16), owners[fields[9]]
