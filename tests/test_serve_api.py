import asyncio
import io
import json

import httpx
import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellray import bundle
from cellray.embedder import tokens_from
from serve import api
from serve.endpoint import application
from tests import tiny

LIMITS = api.Limits(bytes=200_000, cells=50, values=900)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("model") / "bundle")
    bundle.write(url, tiny.embedder(), golden=tiny.tokens(5))
    return bundle.load(url)


@pytest.fixture(scope="module")
def app(model):
    return application(model, LIMITS)


def ask(app, method, path, **request):
    async def go():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def post(app, body, kind=api.JSON, path="/v1/embed", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(app, "POST", path, content=content, headers={"content-type": kind, **headers})


def indexed(matrix, genes=tiny.GENES):
    rows = [matrix[i] for i in range(matrix.shape[0])]
    cells = [{"i": row.indices.tolist(), "x": row.data.astype(int).tolist()} for row in rows]
    return {"genes": list(genes), "cells": cells}


def arrow(matrix, genes=tiny.GENES, *, coded=True, batches=1, compression=None, **columns):
    offsets = pa.array(matrix.indptr.astype(np.int32))
    indices = pa.array(matrix.indices.astype(np.int32))
    names = pa.DictionaryArray.from_arrays(indices, pa.array(genes))
    if not coded:
        names = names.cast(pa.string())
    table = pa.table(
        {
            "genes": pa.ListArray.from_arrays(offsets, names),
            "counts": pa.ListArray.from_arrays(offsets, pa.array(matrix.data.astype(np.uint32))),
            **columns,
        }
    )
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=-(-matrix.shape[0] // batches))
    return sink.getvalue()


def table_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == api.ARROW
    return pa.ipc.open_stream(response.content).read_all()


def vectors_of(response):
    if response.headers["content-type"] == api.ARROW:
        column = table_of(response)["embedding"].combine_chunks()
        return column.flatten().to_numpy().reshape(len(column), -1)
    assert response.status_code == 200, response.text
    return np.array([cell["embedding"] for cell in response.json()["cells"]], np.float32)


def problem_of(response, status, kind):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == api.PROBLEM
    said = response.json()
    assert (said["kind"], said["status"]) == (kind, status)
    return said


def test_every_body_and_answer_gives_the_offline_bits(app, model):
    matrix = tiny.counts(40)
    wanted = model.embed(tokens_from(model.tokenizer, matrix, tiny.GENES)[0]).vectors
    named = {"cells": [dict(zip(tiny.SYMBOLS, r.tolist(), strict=True)) for r in matrix.toarray()]}
    bodies = [
        (indexed(matrix), api.JSON),
        (named, "application/json; charset=utf-8"),
        (arrow(matrix), api.ARROW),
        (arrow(matrix, coded=False, batches=3), api.ARROW),
    ]
    for body, kind in bodies:
        for accept in (api.JSON, api.ARROW):
            assert np.array_equal(vectors_of(post(app, body, kind, accept=accept)), wanted)
    for i in (0, 17, 39):
        assert np.array_equal(vectors_of(post(app, indexed(matrix[i])))[0], wanted[i])


def test_a_transformer_is_asked_and_answers_as_a_sparse_mlp_does(app, model):
    other = tiny.embedder(kind="transformer")
    there = application(other, LIMITS)
    matrix = tiny.counts(20)
    wanted = other.embed(tokens_from(other.tokenizer, matrix, tiny.GENES)[0]).vectors
    assert np.array_equal(vectors_of(post(there, indexed(matrix))), wanted)
    for path in ("/v1/embed", "/v1/annotate", "/v1/translate/rna"):
        ours, theirs = (post(one, indexed(matrix[0]), path=path).json() for one in (app, there))
        assert ours.keys() == theirs.keys()
        assert ours["cells"][0].keys() == theirs["cells"][0].keys()
    assert ask(there, "GET", "/v1/models").json()["models"][0].keys() == (
        ask(app, "GET", "/v1/models").json()["models"][0].keys()
    )


def test_annotations_and_translations_are_those_of_the_embedder(app, model):
    matrix = tiny.counts(20)
    cells = tokens_from(model.tokenizer, matrix, tiny.GENES)[0]
    said = post(app, indexed(matrix), path="/v1/annotate").json()["cells"]
    wanted = model.annotate(cells)
    assert [cell["label"] for cell in said] == wanted.labels.tolist()
    assert [cell["confidence"] for cell in said] == wanted.confidence.tolist()
    table = table_of(post(app, indexed(matrix), path="/v1/translate/atac", accept=api.ARROW))
    values = table["values"].combine_chunks().flatten().to_numpy().reshape(20, -1)
    assert np.array_equal(values, model.translate(cells, "atac"))


def test_an_answer_reports_genes_counts_and_how_unusual_a_cell_is(app, model):
    matrix = sp.hstack([tiny.counts(10), sp.csr_matrix(np.full((10, 2), 5.0))], format="csr")
    response = post(app, indexed(matrix, [*tiny.GENES, "odd1", "odd2"]))
    cells, match = tokens_from(model.tokenizer, matrix, [*tiny.GENES, "odd1", "odd2"])
    said = response.json()
    assert said["match"] == match.summary()
    assert said["match"]["first_unknown"] == ["odd1", "odd2"]
    assert [cell["kept"] for cell in said["cells"]] == match.kept.tolist()
    assert [cell["genes"] for cell in said["cells"]] == match.genes.tolist()
    assert [cell["ood"] for cell in said["cells"]] == model.embed(cells).ood.tolist()
    assert said["model"] == response.headers["x-model-sha256"] == model.hash
    metadata = table_of(post(app, arrow(tiny.counts(3)), api.ARROW, accept=api.ARROW)).schema.metadata
    assert json.loads(metadata[b"cellray"])["model"] == model.hash


def test_totals_reach_the_tokens(app, model):
    matrix = tiny.counts(6)
    total = matrix.sum(axis=1).A1.astype(int) + np.arange(6)
    cells = tokens_from(model.tokenizer, matrix, tiny.GENES, total=total)[0]
    wanted = model.embed(cells).vectors
    body = indexed(matrix)
    for cell, depth in zip(body["cells"], total.tolist(), strict=True):
        cell["total"] = depth
    assert np.array_equal(vectors_of(post(app, body)), wanted)
    sent = arrow(matrix, total=pa.array(total))
    assert np.array_equal(vectors_of(post(app, sent, api.ARROW)), wanted)


def test_the_model_its_vocabulary_and_health_are_told(app, model):
    about = ask(app, "GET", "/v1/models").json()["models"][0]
    assert about == ask(app, "GET", f"/v1/models/{about['id']}").json()
    assert about["sha256"] == model.hash
    assert about["modalities"] == {"rna": 120, "atac": 30}
    assert about["classes"] == ["glia", "neuron"]
    assert about["species"] == ["human"]
    assert about["limits"] == {"bytes": 200_000, "cells": 50, "values": 900}
    vocabulary = pa.ipc.open_stream(ask(app, "GET", "/v1/vocabulary").content).read_all()
    assert vocabulary["id"].to_pylist() == [*tiny.GENES, *tiny.PEAKS]
    assert ask(app, "GET", "/healthz").json()["status"] == "ok"
    assert ask(app, "GET", "/readyz").status_code == 200
    problem_of(ask(app, "GET", "/v1/models/other"), 404, "not_found")


def test_request_ids_come_back_if_they_are_harmless(app):
    body = indexed(tiny.counts(1))
    assert post(app, body, **{"x-request-id": "run-7.a"}).headers["x-request-id"] == "run-7.a"
    assert "<" not in post(app, body, **{"x-request-id": "<script>"}).headers["x-request-id"]
    assert "infer;dur=" in post(app, body).headers["server-timing"]


@pytest.mark.parametrize(
    ("body", "says", "pointer"),
    [
        (b"", "no JSON", None),
        (b"{", "no JSON", None),
        (b"\xff\xfe", "no JSON", None),
        (b"[" * 100_000, "nested too deeply", None),
        (b'{"cells": [{"a": NaN}]}', "NaN is no JSON number", None),
        (b'{"cells": [{"a": 1, "a": 2}]}', "names a key twice", None),
        (b"[]", "an object with a list", "/cells"),
        ({"cells": 3}, "an object with a list", "/cells"),
        ({"cells": [[1]]}, "must be an object", "/cells/0"),
        ({"cells": [{}], "gene": []}, "'gene' is not known here", "/gene"),
        ({"cells": [{"a": "1"}]}, "must map genes to counts", "/cells/0"),
        ({"cells": [{"a": True}]}, "must map genes to counts", "/cells/0"),
        ({"cells": [{"i": [0], "x": [1]}]}, 'the body needs "genes"', "/cells/0"),
        ({"genes": "abc", "cells": [{}]}, "genes must be a list", "/genes"),
        ({"genes": ["a"], "cells": [{"i": [0], "x": []}]}, "lists", "/cells/0"),
        ({"genes": ["a"], "cells": [{"i": [1], "x": [1]}]}, "from 0 to 0", "/cells/0/i"),
        ({"genes": ["a"], "cells": [{"i": [-1], "x": [1]}]}, "from 0 to 0", "/cells/0/i"),
        ({"genes": ["a"], "cells": [{"i": [0.0], "x": [1]}]}, "from 0 to 0", "/cells/0/i"),
        ({"genes": ["a"], "cells": [{"i": [0], "x": [None]}]}, "must be numbers", "/cells/0/x"),
        ({"genes": ["a"], "cells": [{"i": [0], "x": [1], "n": 1}]}, "nothing else", "/cells/0"),
        ({"genes": ["a"], "cells": [{"i": [0], "x": [1], "total": -1}]}, "whole", "/cells/0/total"),
    ],
)
def test_malformed_json_is_refused_with_the_place(app, body, says, pointer):
    said = problem_of(post(app, body), 400, "invalid")
    assert says in said["detail"]
    assert said.get("pointers") == ([pointer] if pointer else None)


def test_what_is_no_raw_count_is_refused_with_the_cell(app):
    body = indexed(tiny.counts(5))
    odd = ((0.693, "not whole"), (-1, "negative"), (1e300, "above"), (2**32, "above"))
    for bad, looks in odd:
        body["cells"][3]["x"][0] = bad
        said = problem_of(post(app, body), 422, "wrong_scale")
        assert looks in said["detail"]
        assert said["pointers"] == ["/cells/3"]
    text = json.dumps(body).replace(str(2**32), "1e999").encode()
    assert problem_of(post(app, text), 422, "wrong_scale")["pointers"] == ["/cells/3"]
    text = json.dumps(body).replace(str(2**32), "1" + "0" * 400).encode()
    problem_of(post(app, text), 422, "wrong_scale")


def test_unknown_genes_and_empty_bodies_are_refused(app):
    unknown = indexed(tiny.counts(2), [f"odd{i}" for i in range(120)])
    said = problem_of(post(app, unknown), 422, "unknown_genes")
    assert "0 of 120 genes" in said["detail"]
    assert "odd9" in said["detail"]
    assert "odd10" not in said["detail"]
    for text in (b'{"cells": []}', b'{"genes": [], "cells": [{"i": [], "x": []}]}', b'{"cells": [{}]}'):
        problem_of(post(app, text), 422, "empty")
    problem_of(post(app, arrow(tiny.counts(2)[:0]), api.ARROW), 422, "empty")


def test_a_total_below_the_counts_is_refused(app):
    body = indexed(tiny.counts(2))
    body["cells"][0]["total"] = 1
    assert "in every cell or in none" in problem_of(post(app, body), 400, "invalid")["detail"]
    body["cells"][1]["total"] = 10**9
    assert "total of cell 0 is 1" in problem_of(post(app, body), 400, "invalid")["detail"]


def test_sizes_are_checked_before_bodies_are_read(app):
    said = problem_of(post(app, b" " * 200_001), 413, "too_large")
    assert "200,000 bytes" in said["detail"]
    problem_of(post(app, {"cells": [{}] * 51}), 413, "too_large")
    problem_of(post(app, arrow(tiny.counts(51)), api.ARROW), 413, "too_large")
    problem_of(post(app, indexed(tiny.counts(31)), path="/v1/translate/atac"), 413, "too_large")


def test_an_endless_body_is_cut_off_at_the_limit(app):
    sent = 0

    async def endless():
        nonlocal sent
        while True:
            sent += 10_000
            yield b" " * 10_000

    response = ask(app, "POST", "/v1/embed", content=endless(), headers={"content-type": api.JSON})
    problem_of(response, 413, "too_large")
    assert sent <= 220_000


def test_other_addresses_methods_and_types_are_problems_too(app, model):
    problem_of(ask(app, "GET", "/nowhere"), 404, "not_found")
    response = ask(app, "GET", "/v1/embed")
    problem_of(response, 405, "method_not_allowed")
    assert "POST" in response.headers["allow"]
    problem_of(post(app, b"", "text/csv"), 415, "unsupported")
    problem_of(post(app, b"", api.JSON, **{"content-encoding": "gzip"}), 415, "unsupported")
    problem_of(post(app, {}, path="/v1/translate/sound"), 404, "not_found")
    unlabelled = application(tiny.embedder(labelled=False))
    problem_of(post(unlabelled, {}, path="/v1/annotate"), 404, "not_found")


def stream_of(table):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"genes": [["a"]]}, "genes and counts are needed"),
        ({"genes": [["a"]], "counts": [[1]], "totals": [1]}, "columns are genes, counts, totals"),
        ({"genes": ["a"], "counts": [[1]]}, "column genes is of type string"),
        ({"genes": [["a"]], "counts": [["1"]]}, "column counts is of type list"),
        ({"genes": [["a"], None], "counts": [[1], [2]]}, "a cell is null"),
        ({"genes": [["a", None]], "counts": [[1, 2]]}, "a gene is null"),
        ({"genes": [["a"]], "counts": [[None, 1]]}, "not as many genes as counts"),
        ({"genes": [["a", "b"]], "counts": [[None, 1]]}, "a number is null"),
        ({"genes": [["a"]], "counts": [[1]], "total": [None]}, "column total is of type null"),
    ],
)
def test_arrow_of_another_form_is_refused(app, columns, says):
    said = problem_of(post(app, stream_of(pa.table(columns)), api.ARROW), 400, "invalid")
    assert says in said["detail"]


def test_compressed_arrow_is_refused_before_it_is_unpacked(app):
    for codec in ("zstd", "lz4"):
        body = arrow(tiny.counts(40), compression=codec)
        assert "compressed" in problem_of(post(app, body, api.ARROW), 400, "invalid")["detail"]
    bomb = stream_of(pa.table({"genes": [["a"] * 10], "counts": [[1] * 10]}))
    assert post(app, bomb, api.ARROW).status_code == 422


def test_log_normalised_arrow_is_refused(app):
    body = stream_of(pa.table({"genes": [list(tiny.GENES[:5])] * 2, "counts": [[1.0] * 5, [0.5] * 5]}))
    assert problem_of(post(app, body, api.ARROW), 422, "wrong_scale")["pointers"] == ["/cells/1"]


def read_or_refuse(body, kind):
    try:
        query = api.read(body, kind, LIMITS)
    except api.Problem as problem:
        said = json.loads(problem.body())
    else:
        said = {"status": 422}
        assert query.counts.shape[0] > 0
        assert query.counts.shape[1] == len(query.genes) > 0
    assert said["status"] in (400, 413, 422)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["genes", "cells", "i", "x", "total", "\ud800"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(JSONS, st.booleans())
def test_any_json_is_read_or_refused(value, wrap):
    value = {"genes": ["a", "b"], "cells": [value]} if wrap else value
    read_or_refuse(json.dumps(value).encode(), api.JSON)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(), st.text(max_size=3)), max_size=8))
def test_any_numbers_and_names_in_a_cell_get_no_server_error(app, pairs):
    cell = {name: number for number, name in pairs}
    assert post(app, {"cells": [cell | dict.fromkeys(tiny.GENES[:6], 1)]}).status_code in (200, 400, 422)


@pytest.mark.parametrize("coded", [True, False])
def test_any_flipped_byte_or_cut_of_arrow_is_read_or_refused(coded):
    body = arrow(tiny.counts(4), coded=coded, batches=2, total=pa.array([9999] * 4))
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(body), 1500):
        flipped = bytearray(body)
        flipped[at] ^= 1 << rng.integers(8)
        read_or_refuse(bytes(flipped), api.ARROW)
    for at in rng.integers(0, len(body), 200):
        read_or_refuse(body[:at], api.ARROW)
