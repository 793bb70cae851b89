import json

import numpy as np
import pyarrow as pa
import pytest

from cellray.data import storage
from cellray.data.store import ABOUT, BATCH, Store, cell_table, concatenate, encode_shard
from tests.test_tokens import matrix, tokenizer


def cells(count, seed=0):
    """Tables of a shard: cells with RNA, every third with ATAC too, and the counts behind them."""
    rna, atac = matrix(count, 12, seed), matrix(count, 5, seed + 1)
    has = np.arange(count) % 3 == 0
    atac = (atac.multiply(has[:, None])).tocsr()
    words = tokenizer()
    counts = {
        name: words.rank(name, x, np.asarray(x.sum(1)).ravel(), ["v2"] * count)
        for name, x in (("rna", rna), ("atac", atac))
    }
    about = {name: [f"{name}{i % 4}" for i in range(count)] for name in ABOUT}
    ids = [f"d{seed}:c{i}" for i in range(count)]
    present = np.where(has, 3, 1).astype(np.uint32)
    return cell_table(words, ids, about, present, counts), rna, atac


def write(folder, *sizes):
    """A store with a shard of each size, at `folder`; returns the counts of all its cells."""
    shards, dense = [], []
    for number, size in enumerate(sizes):
        table, rna, atac = cells(size, seed=number)
        data = encode_shard(table)
        name = f"{number:05d}-{storage.sha256(data)}.arrow"
        storage.write_bytes(storage.join(folder, "shards", name), data)
        shards.append({"name": name, "sha256": storage.sha256(data), "bytes": len(data), "rows": size})
        dense.append((rna.toarray(), atac.toarray()))
    sink = pa.BufferOutputStream()
    table = tokenizer().to_arrow()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    words = sink.getvalue().to_pybytes()
    name = f"vocabulary-{storage.sha256(words)}.arrow"
    storage.write_bytes(storage.join(folder, name), words)
    manifest = {"version": 1, "vocabulary": {"name": name, "sha256": storage.sha256(words)}, "shards": shards}
    storage.write_bytes(storage.join(folder, "store.json"), json.dumps(manifest).encode())
    return [np.concatenate(part) for part in zip(*dense, strict=True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of three shards, two of which have more than one record batch."""
    folder = str(tmp_path_factory.mktemp("store"))
    return folder, write(folder, BATCH + 7, 5, 2 * BATCH)


def test_every_cell_comes_back_with_its_counts(written):
    folder, (rna, atac) = written
    store = Store(folder)
    assert len(store) == 3 * BATCH + 12
    assert np.diff(store.starts).tolist() == [BATCH, 7, 5, BATCH, BATCH]
    whole = concatenate([store.batch(i) for i in range(5)])
    np.testing.assert_array_equal(whole.rows, np.arange(len(store)))
    np.testing.assert_array_equal(whole.counts["rna"].matrix(12).toarray(), rna)
    np.testing.assert_array_equal(whole.counts["atac"].matrix(5).toarray(), atac)
    np.testing.assert_array_equal(whole.counts["rna"].total, rna.sum(1))
    assert set(whole.present.tolist()) == {1, 3}


def test_any_rows_come_in_the_order_asked_for(written):
    folder, (rna, atac) = written
    store = Store(folder)
    rows = np.random.default_rng(0).integers(0, len(store), 60)
    batch = store.read(rows)
    np.testing.assert_array_equal(batch.rows, rows)
    np.testing.assert_array_equal(batch.counts["rna"].matrix(12).toarray(), rna[rows])
    np.testing.assert_array_equal(batch.counts["atac"].matrix(5).toarray(), atac[rows])
    assert len(store.read(np.empty(0, np.int64)).rows) == 0


def test_what_is_known_of_cells_is_read_without_tokens(written):
    folder, (rna, _) = written
    table = Store(folder).cells
    assert table.num_rows == 3 * BATCH + 12
    assert table["cell_id"][BATCH + 7].as_py() == "d1:c0"
    assert table["label"][2].as_py() == "label2"
    np.testing.assert_array_equal(table["rna.total"].to_numpy(), rna.sum(1))
    np.testing.assert_array_equal(table["rna.length"].to_numpy(), (rna > 0).sum(1))


def test_the_same_cells_give_the_same_bytes():
    assert encode_shard(cells(20)[0]) == encode_shard(cells(20)[0])
    table = cells(20)[0]
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3)])
    assert encode_shard(pieces) == encode_shard(table)


def test_a_folder_without_a_manifest_is_no_store(tmp_path):
    write(str(tmp_path), 5)
    (tmp_path / "store.json").unlink()
    with pytest.raises(ValueError, match=r"no store at .*pipelines\.ingest"):
        Store(str(tmp_path))


def test_a_changed_a_cut_and_a_missing_shard_are_named(tmp_path):
    write(str(tmp_path), 5, 6)
    path = sorted((tmp_path / "shards").iterdir())[1]
    data = path.read_bytes()
    for bad in (data[:-1], data[:100] + b"\xff" + data[101:]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="the manifest says") as error:
            Store(str(tmp_path)).batch(1)
        assert path.name in str(error.value)
        assert len(Store(str(tmp_path)).batch(0).rows) == 5
    path.unlink()
    with pytest.raises(ValueError, match="does not exist: the store was damaged"):
        Store(str(tmp_path)).batch(1)


def test_a_changed_vocabulary_is_named(tmp_path):
    write(str(tmp_path), 5)
    (path,) = tmp_path.glob("vocabulary-*")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"vocabulary-.* has sha256"):
        _ = Store(str(tmp_path)).tokenizer


def test_a_store_of_another_version_is_refused(tmp_path):
    (tmp_path / "store.json").write_text('{"version": 99}')
    with pytest.raises(ValueError, match="version 99, this cellray reads 1"):
        Store(str(tmp_path))
