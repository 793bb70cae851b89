import dataclasses
import itertools
import json
import re

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from cellray.data import storage
from cellray.data.cache import Cache
from cellray.data.shards import START, Index, checksum
from cellray.data.store import (
    ABOUT,
    BATCH,
    Store,
    cell_table,
    collect,
    concatenate,
    edition_path,
    editions,
    encode_shard,
    index_of,
)
from cellray.data.sums import one_pass
from cellray.data.tokens import Counts
from tests import stores
from tests.test_tokens import matrix, tokenizer


def cells(count, seed=0, width=np.uint32):
    """Tables of a shard: cells with RNA, every third with ATAC too, and the counts behind them."""
    rna, atac = matrix(count, 12, seed), matrix(count, 5, seed + 1)
    has = np.arange(count) % 3 == 0
    atac = (atac.multiply(has[:, None])).tocsr()
    words = tokenizer()
    counts = {
        name: words.rank(name, x, np.asarray(x.sum(1)).ravel(), ["v2"] * count)
        for name, x in (("rna", rna), ("atac", atac))
    }
    for name, c in counts.items():
        counts[name] = Counts(c.offsets, c.ids, c.counts.astype(width), c.total)
    about = {name: [f"{name}{i % 4}" for i in range(count)] for name in ABOUT}
    ids = [f"d{seed}:c{i}" for i in range(count)]
    present = np.where(has, 3, 1).astype(np.uint32)
    digests = np.arange(count).astype(np.uint64) << np.uint64(40)
    return cell_table(words, ids, about, present, counts, digests=digests), rna, atac


def write(folder, *sizes, widths=(np.uint32,)):
    """A store with a shard of each size, at `folder`; returns the counts of all its cells."""
    shards: list = []
    dense = []
    for number, size in enumerate(sizes):
        table, rna, atac = cells(size, seed=number, width=widths[number % len(widths)])
        shards = stores.write_table(folder, table, tokenizer(), size, older=shards)
        dense.append((rna.toarray(), atac.toarray()))
    return [np.concatenate(part) for part in zip(*dense, strict=True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A store of three shards, two of which have more than one record batch."""
    folder = str(tmp_path_factory.mktemp("store"))
    return folder, write(folder, BATCH + 7, 5, 2 * BATCH, widths=(np.uint8, np.uint32, np.uint16))


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
    index = Index(**index_of(data))
    place = index.offset[0] + index.front[0] - 1
    for bad in (data[: place - 1], data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="the manifest says") as error:
            Store(str(tmp_path)).batch(1)
        assert path.name in str(error.value)
        assert storage.sha256(data)[:16] in str(error.value)
        assert storage.sha256(bad)[:16] in str(error.value)
        assert len(Store(str(tmp_path)).batch(0).rows) == 5
    path.unlink()
    with pytest.raises(ValueError, match="does not exist: the store was damaged"):
        Store(str(tmp_path)).batch(1)


def test_every_byte_of_a_shard_is_checked_before_it_is_used(tmp_path):
    write(str(tmp_path), 40)
    (path,) = (tmp_path / "shards").iterdir()
    data = path.read_bytes()
    direct = Store(str(tmp_path))
    rows, known = direct.read(np.arange(40)), direct.cells.to_pandas()
    index = Index(**index_of(data))
    end = index.offset[0] + index.bytes[0]

    def read():
        store = Store(str(tmp_path))
        assert_same = np.testing.assert_array_equal
        assert_same(store.read(np.arange(40)).counts["rna"].ids, rows.counts["rna"].ids)
        assert store.cells.to_pandas().equals(known)

    read()
    for place in range(START, end, 11):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(ValueError, match=re.escape(path.name)):
            read()
    path.write_bytes(data[:-3] + b"abc")  # the footer, which no reader needs
    assert Store(str(tmp_path)).read(np.arange(40)).rows.tolist() == list(range(40))
    with pytest.raises(ValueError, match="the manifest says"):
        Store(str(tmp_path)).verify(0)


def test_a_changed_vocabulary_is_named(tmp_path):
    write(str(tmp_path), 5)
    (path,) = tmp_path.glob("vocabulary-*")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"vocabulary-.* has sha256"):
        _ = Store(str(tmp_path)).tokenizer


def test_a_store_of_another_version_is_refused(tmp_path):
    (tmp_path / "store.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="version 1, this cellray reads 3: ingest the files again"):
        Store(str(tmp_path))
    (tmp_path / "store.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"store\.json is no manifest"):
        Store(str(tmp_path))


def test_names_in_a_manifest_do_not_lead_out_of_the_store(tmp_path):
    write(str(tmp_path), 5)
    manifest = json.loads((tmp_path / "store.json").read_text())
    for name in ("../other.arrow", "/etc/passwd", "a/b", ".hidden"):
        manifest["shards"][0]["name"] = name
        (tmp_path / "store.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match="no name of a file"):
            Store(str(tmp_path))


def test_counts_are_as_narrow_as_they_were_given(written):
    folder, _ = written
    store = Store(folder)
    assert [store.batch(i).counts["rna"].counts.dtype.itemsize for i in range(5)] == [1, 1, 4, 2, 2]
    assert store.widths == {"rna": np.uint32, "atac": np.uint32}
    assert store.read(np.array([0, BATCH + 8])).counts["rna"].counts.dtype == np.uint32


def test_the_index_says_what_is_in_each_record_batch(written):
    folder, (rna, atac) = written
    ends = Store(folder).starts
    tokens: dict = {"rna": [], "atac": []}
    for shard in Store(folder).shards:
        data = storage.read_bytes(storage.join(folder, "shards", shard.name))
        assert shard.index == index_of(data)
        for name, numbers in shard.batches.tokens.items():
            tokens[name] += numbers
    for name, dense in (("rna", rna), ("atac", atac)):
        assert tokens[name] == [int((dense[a:b] > 0).sum()) for a, b in itertools.pairwise(ends)]


def test_columns_of_cells_are_read_alone_and_together(written):
    folder, _ = written
    cells = Store(folder).cells
    whole = cells.to_pandas()
    assert cells.num_rows == len(cells) == len(whole) == 3 * BATCH + 12
    for name in cells.column_names:
        assert Store(folder).cells[name].to_pandas().equals(whole[name])
    codes = cells.codes("donor")
    assert codes.to_pylist() == whole["donor"].tolist()
    assert len(codes.dictionary) == 4
    assert whole["digest"][3] == 3 << 40
    with pytest.raises(KeyError, match="no column 'colour'"):
        cells["colour"]


def test_gathered_cells_are_those_of_the_plain_way(written):
    folder, (rna, _) = written
    batches = [Store(folder).batch(i) for i in range(5)]
    rng = np.random.default_rng(1)
    source = rng.integers(0, 5, 200)
    row = np.array([rng.integers(0, len(batches[s].rows)) for s in source])
    found = collect(batches, source, row)
    assert np.array_equal(found.counts["rna"].matrix(12).toarray(), rna[found.rows])
    assert found.rows.tolist() == [int(batches[s].rows[r]) for s, r in zip(source, row, strict=True)]
    assert found.counts["rna"].ids.flags.writeable


def test_checksums_tell_swapped_words_and_lengths():
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 40_000, np.uint8)
    seen = {checksum(data.tobytes())}
    for _ in range(200):
        other, (a, b) = data.copy(), rng.integers(0, 5000, 2) * 8
        other[a : a + 8], other[b : b + 8] = data[b : b + 8], data[a : a + 8]
        if not np.array_equal(other, data):
            assert checksum(other.tobytes()) not in seen
        other = data.copy()
        other[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
        seen.add(checksum(other.tobytes()))
    lengths = [checksum(bytes(n)) for n in range(50)]
    assert len(set(lengths)) == 50
    assert len(seen) > 190


@pytest.mark.parametrize("size", [0, 7, 3071, 3072, 40_000, 1 << 20])
@pytest.mark.parametrize("start", [0, 3])
def test_checksums_are_the_same_in_one_pass(size, start):
    data = np.random.default_rng(size).integers(0, 256, start + size, np.uint8).data[start:]
    assert checksum(data, sums=one_pass) == checksum(data)


@pytest.mark.parametrize("apart", [(), ("rna", "atac")])
@pytest.mark.parametrize("width", [np.uint8, np.uint16, np.uint32])
def test_large_counts_come_back_wherever_they_are_kept(tmp_path, width, apart):
    random, size = np.random.default_rng(0), BATCH + 50
    lengths = random.integers(0, 9, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.arange(n) for n in lengths])
    large = random.random(len(ids)) < 0.02
    values = np.where(large, random.integers(1, np.iinfo(width).max, len(ids), endpoint=True), 1).astype(
        width
    )
    nothing = Counts(np.zeros(size + 1, np.int64), ids[:0], values[:0], np.zeros(size))
    counts = {"rna": Counts(offsets, ids, values, lengths), "atac": nothing}
    names, present = [f"c{i}" for i in range(size)], np.ones(size)
    about = {name: [""] * size for name in ABOUT}
    table = cell_table(tokenizer(), names, about, present, counts, apart=apart)
    assert table["rna.counts"].type.value_type == (pa.uint8() if apart else pa.from_numpy_dtype(width))
    stores.write_table(str(tmp_path), table, tokenizer(), size)
    store = Store(str(tmp_path))
    found = [store.batch(number).counts["rna"].counts for number in (0, 1)]
    assert {own.dtype for own in found} == {store.widths["rna"]} == {np.dtype(width)}
    assert np.array_equal(np.concatenate(found), values)


def grown(folder):
    """A store of two editions, the second with a shard more."""
    table, *_ = cells(30)
    older = stores.write_table(folder, table, tokenizer(), 20)
    more, *_ = cells(12, seed=5)
    stores.write_table(folder, more, tokenizer(), 20, edition=2, older=older)


def test_the_newest_edition_opens_and_older_ones_by_their_hash(tmp_path):
    folder = str(tmp_path)
    assert editions(folder) == editions(folder + "/nowhere") == []
    grown(folder)
    assert editions(folder) == [edition_path(folder, 1), edition_path(folder, 2)]
    assert edition_path(folder, 2).endswith("/store-000002.json")
    assert len(Store(folder)) == 42
    first = storage.sha256((tmp_path / "store.json").read_bytes())
    pinned = Store(folder, hash=first)
    assert (len(pinned), pinned.hash, pinned.path) == (30, first, edition_path(folder, 1))
    assert np.array_equal(
        pinned.read(np.arange(30)).counts["rna"].ids, Store(folder).read(np.arange(30)).counts["rna"].ids
    )
    with pytest.raises(ValueError, match=r"no edition with hash 00.*store-000002\.json .*store\.json"):
        Store(folder, hash="00")
    (tmp_path / "store.json").unlink()
    with pytest.raises(ValueError, match="no store at"):
        Store(folder)


@pytest.fixture
def remote(tmp_path):
    """A store in a file system that is not local, and how its files are read."""
    grown(str(tmp_path / "here"))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "here") + "/", "/cells/", recursive=True)
    yield "memory://cells", memory
    memory.rm("/cells", recursive=True)


def test_a_remote_store_reads_the_same_with_and_without_a_cache(remote, tmp_path):
    url, memory = remote
    here = Store(str(tmp_path / "here"))
    cache = Cache(str(tmp_path / "cache"), 1 << 20)
    for store in (Store(url), Store(url, cache=cache), Store(url, cache=cache)):
        batch = store.read(np.arange(42))
        assert np.array_equal(batch.counts["rna"].ids, here.read(np.arange(42)).counts["rna"].ids)
        assert store.cells.to_pandas().equals(here.cells.to_pandas())
    assert cache.hits >= cache.misses > 0
    for name in memory.ls("/cells/shards", detail=False):
        memory.rm(name)
    again = Store(url, cache=cache)
    assert again.read(np.arange(42)).rows.tolist() == list(range(42))
    for file in (tmp_path / "cache").glob("??/*"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="does not exist"):
        Store(url, cache=cache).batch(0)


def test_wrong_bytes_from_a_server_are_read_again(remote, monkeypatch):
    url, memory = remote
    wrong = iter([True, False, True, True, False] + [False] * 100)
    right = type(memory).cat_file

    def cat_file(self, path, start=None, end=None, **more):
        data = right(self, path, start=start, end=end, **more)
        return b"?" + data[1:] if path.endswith("arrow") and "shards" in path and next(wrong) else data

    store = Store(url)
    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    assert store.batch(0).rows.tolist() == list(range(20))


def test_an_index_with_lists_of_different_lengths_is_refused(written):
    index = Store(written[0]).shards[0].batches
    with pytest.raises(ValueError, match="different lengths"):
        dataclasses.replace(index, offset=index.offset[:-1])
