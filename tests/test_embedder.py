import numpy as np
import pytest
import scipy.sparse as sp
import torch

from cellray import heads
from cellray.data.modalities import scaled
from cellray.embedder import CHUNK, UnknownGenes, tokens_from, vectors
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture(scope="module", params=["mlp", "transformer"])
def either(request):
    """A model of either kind."""
    return tiny.embedder(kind=request.param)


@pytest.fixture(scope="module")
def words():
    return tiny.tokenizer()


def answers(model, cells):
    embedded, annotated = model.embed(cells), model.annotate(cells)
    return (
        embedded.vectors,
        embedded.ood,
        annotated.probabilities,
        model.translate(cells, "rna"),
        model.translate(cells, "atac"),
    )


def test_a_cell_has_the_same_bits_alone_in_any_batch_and_at_any_place(either):
    cells = tiny.tokens(200)
    context = tiny.SIZES["transformer"]["context"]
    assert min((cells.lengths < context).sum(), (cells.lengths >= context).sum()) > 50
    whole = answers(either, cells)
    rng = np.random.default_rng(0)
    batches = [np.array([i]) for i in (0, 1, 63, 64, 199)]
    batches += [rng.permutation(200)[:n] for n in (7, CHUNK, 65, 200)]
    for rows in batches:
        for part, all_ in zip(answers(either, cells.take(rows)), whole, strict=True):
            assert np.array_equal(part, all_[rows])


def test_the_number_of_threads_changes_no_bit_and_is_given_back(either):
    model = either
    cells = tiny.tokens(70)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = model.embed(cells).vectors
        assert torch.get_num_threads() == 2
        torch.set_num_threads(1)
        assert np.array_equal(model.embed(cells).vectors, two)
    finally:
        torch.set_num_threads(before)


def test_embeddings_are_those_of_the_student_run_cell_by_cell(either, words):
    model, cells = either, tiny.tokens(5)
    found = model.embed(cells).vectors
    if model.student.ranked:
        cells = words.rank("rna", cells.matrix(len(tiny.GENES)), cells.total, [""] * 5)
    for i in range(5):
        cell = cells.take(np.array([i]))
        values = scaled(cell.counts, np.repeat(cell.total, cell.lengths), "log1p_cp10k")
        with torch.inference_mode():
            alone = model.student(
                torch.from_numpy(cell.ids.astype(np.int64)),
                torch.from_numpy(values),
                torch.tensor([0]),
                torch.log1p(torch.tensor([float(cell.total[0])])),
            ).embedding[0]
        np.testing.assert_allclose(found[i], alone.numpy(), rtol=1e-5, atol=1e-6)


def test_a_student_without_heads_gives_the_same_bits(either):
    model, cells = either, tiny.tokens(100)
    assert np.array_equal(vectors(model.student, model.tokenizer, cells), model.embed(cells).vectors)


def test_no_cells_get_no_answers_of_the_right_shape(either):
    model = either
    none = tiny.tokens(3).take(np.empty(0, np.int64))
    assert model.embed(none).vectors.shape == (0, 16)
    assert model.annotate(none).labels.shape == (0,)
    assert model.translate(none, "atac").shape == (0, len(tiny.PEAKS))


def test_labels_are_learnt_and_sure(model):
    said = model.annotate(tiny.tokens(100))
    truth = np.array(["neuron", "glia"] * 50)
    assert (said.labels == truth).mean() > 0.9
    np.testing.assert_allclose(said.probabilities.sum(axis=1), 1, rtol=1e-6)
    assert np.array_equal(said.confidence, said.probabilities.max(axis=1))


def test_the_head_is_the_regression_that_was_fitted():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8)) * rng.gamma(1, 3, 8)
    labels = np.array(["a", "b", "c"])[(x[:, 0] > 0) + (x[:, 1] > 1).astype(int)]
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    for names in (labels, np.where(labels == "c", "b", labels)):
        wanted = LogisticRegression(max_iter=2000).fit(standard, names).predict_proba(standard)
        head = heads.fit_head(x, names)
        assert head is not None
        found = head.probabilities(torch.from_numpy(x))
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_no_head_where_fewer_than_two_labels_are_known():
    x = np.random.default_rng(0).normal(size=(20, 4))
    assert heads.fit_head(x, ["a"] * 10 + [""] * 10) is None
    with pytest.raises(ValueError, match="gives no labels"):
        tiny.embedder(labelled=False).annotate(tiny.tokens(1))


def test_out_of_distribution_scores_rise_from_the_training_cells_outwards():
    x = np.random.default_rng(0).normal(size=(2000, 6)) @ np.diag([1, 2, 3, 1, 1, 0.1])
    reference = heads.fit_reference(x)
    scores = reference.score(torch.from_numpy(x))
    assert abs(scores.mean() - 0.5) < 0.02
    assert reference.score(torch.from_numpy(x.mean(axis=0) + np.eye(6)[[5]] * 3))[0] > 0.99
    assert reference.score(torch.full((1, 6), 100.0))[0] == 1


def test_a_reference_takes_constant_embeddings():
    reference = heads.fit_reference(np.ones((30, 4), np.float32))
    assert np.isfinite(reference.score(torch.ones(2, 4))).all()


def test_a_cell_without_known_genes_is_marked(model, words):
    matrix = sp.csr_matrix(np.vstack([np.zeros(120), tiny.counts(1).toarray()[0]]))
    cells, match = tokens_from(words, matrix, tiny.GENES)
    said = model.annotate(cells)
    assert (said.labels[0], said.confidence[0], said.ood[0]) == ("", 0, 1)
    assert model.embed(cells).ood[0] == 1
    assert match.genes[0] == 0
    assert match.kept[0] == 0
    assert match.kept[1] == 1


def test_sparse_dense_integer_and_float_counts_give_the_same_tokens(words):
    matrix = tiny.counts(20)
    wanted = tokens_from(words, matrix, tiny.GENES)[0]
    for other in (matrix.tocsc(), matrix.toarray(), matrix.toarray().astype(int), matrix.astype(np.uint16)):
        assert same(tokens_from(words, other, tiny.GENES)[0], wanted)


def same(a, b):
    return all(np.array_equal(getattr(a, k), getattr(b, k)) for k in ("offsets", "ids", "counts", "total"))


def test_versions_symbols_and_order_of_genes_do_not_matter(words):
    matrix = tiny.counts(20)
    wanted = tokens_from(words, matrix, tiny.GENES)[0]
    versioned = [f"{name}.{i}" for i, name in enumerate(tiny.GENES)]
    assert same(tokens_from(words, matrix, versioned)[0], wanted)
    assert same(tokens_from(words, matrix, tiny.SYMBOLS)[0], wanted)
    order = np.random.default_rng(0).permutation(120)
    assert same(tokens_from(words, matrix[:, order], [tiny.GENES[i] for i in order])[0], wanted)


def test_counts_of_genes_named_twice_are_summed(words):
    matrix = tiny.counts(20)
    wanted = tokens_from(words, matrix * 3, tiny.GENES)[0]
    twice = sp.hstack([matrix, matrix * 2], format="csr")
    assert same(tokens_from(words, twice, [*tiny.GENES, *tiny.SYMBOLS])[0], wanted)


def test_unknown_genes_count_towards_depth_and_are_reported(words):
    matrix = tiny.counts(20)
    extra = sp.csr_matrix(np.full((20, 12), 2.0))
    names = [*tiny.GENES, *(f"odd{i}" for i in range(12))]
    cells, match = tokens_from(words, sp.hstack([matrix, extra], format="csr"), names)
    depth = matrix.sum(axis=1).A1
    assert np.array_equal(cells.total, depth + 24)
    np.testing.assert_allclose(match.kept, depth / (depth + 24), rtol=1e-6)
    assert match.summary() == {
        "genes_sent": 132,
        "genes_known": 120,
        "genes_unknown": 12,
        "first_unknown": [f"odd{i}" for i in range(10)],
        "counts_kept": pytest.approx(depth.sum() / (depth.sum() + 480)),
    }


def test_a_total_stands_for_the_genes_left_out(model, words):
    matrix = tiny.counts(20)
    extra = sp.csr_matrix(np.full((20, 3), 7.0))
    names = [*tiny.GENES, "odd0", "odd1", "odd2"]
    whole = tokens_from(words, sp.hstack([matrix, extra], format="csr"), names)[0]
    trimmed = tokens_from(words, matrix, tiny.GENES, total=matrix.sum(axis=1).A1 + 21)[0]
    assert same(whole, trimmed)
    with pytest.raises(ValueError, match="total of cell 0"):
        tokens_from(words, matrix, tiny.GENES, total=np.ones(20))
    with pytest.raises(ValueError, match="totals of 19 cells, but counts of 20"):
        tokens_from(words, matrix, tiny.GENES, total=np.full(19, 10**6))


def test_too_few_known_genes_are_refused_by_name(words):
    mouse = [f"ENSMUSG{i:011d}" for i in range(120)]
    with pytest.raises(UnknownGenes, match=r"0 of 120 genes .* ENSMUSG00000000000, .*look like ENSG0"):
        tokens_from(words, tiny.counts(2), mouse)
    with pytest.raises(UnknownGenes, match="4 of 4"):
        tokens_from(words, tiny.counts(2)[:, :4], tiny.GENES[:4])
    some = [*tiny.GENES[:11], *mouse[11:]]
    with pytest.raises(UnknownGenes, match="11 of 120"):
        tokens_from(words, tiny.counts(2), some)


def test_a_whole_transcriptome_is_welcome_to_a_small_vocabulary(words):
    matrix = sp.hstack([tiny.counts(3), sp.csr_matrix((3, 5000))], format="csr")
    cells, match = tokens_from(words, matrix, [*tiny.GENES, *(f"odd{i}" for i in range(5000))])
    assert same(cells, tokens_from(words, tiny.counts(3), tiny.GENES)[0])
    assert match.known == 120


@pytest.mark.parametrize(
    ("change", "looks"),
    [
        (np.log1p, "log-normalised"),
        (lambda x: (x - x.mean()) / x.std(), "scaled"),
        (lambda x: x / x.sum(axis=1, keepdims=True) * 1e4, "normalised to a depth"),
        (lambda x: np.where(x == x.max(), np.nan, x), "NaN"),
    ],
)
def test_what_is_not_raw_counts_is_refused_with_what_it_looks_like(words, change, looks):
    with pytest.raises(ValueError, match=rf"file\.h5ad: X has .*{looks}"):
        tokens_from(words, change(tiny.counts(20).toarray()), tiny.GENES, where="file.h5ad: X")


def test_names_and_columns_must_agree(words):
    with pytest.raises(ValueError, match="120 columns of counts, but 119 gene names"):
        tokens_from(words, tiny.counts(2), tiny.GENES[1:])


def test_tokens_are_the_counts_in_id_order(words):
    matrix = tiny.counts(20)
    order = np.random.default_rng(0).permutation(120)
    cells = tokens_from(words, matrix[:, order], [tiny.GENES[i] for i in order])[0]
    assert cells.ids.tolist() == np.concatenate([np.flatnonzero(row) for row in matrix.toarray()]).tolist()
    assert np.array_equal(cells.matrix(120).toarray(), matrix.toarray())
    assert (cells.offsets.dtype, cells.ids.dtype, cells.counts.dtype) == (np.int64, np.uint8, np.uint32)


def test_the_order_of_a_cells_tokens_changes_no_bit(either, words):
    model = either
    matrix = tiny.counts(150).tolil()
    matrix[[0, 70, 149]] = 0
    matrix = matrix.tocsr()
    cells = tokens_from(words, matrix, tiny.GENES)[0]
    wanted = answers(model, cells)
    for assay in ("", "10x"):
        ranked = words.rank("rna", matrix, cells.total, [assay] * 150)
        assert not np.array_equal(ranked.ids, cells.ids)
        assert all(np.array_equal(a, b) for a, b in zip(answers(model, ranked), wanted, strict=True))
    order = np.random.default_rng(0).permutation(120)
    sent = tokens_from(words, matrix[:, order], [tiny.GENES[i] for i in order])[0]
    assert all(np.array_equal(a, b) for a, b in zip(answers(model, sent), wanted, strict=True))


def test_translation_speaks_in_counts_and_probabilities(model):
    cells = tiny.tokens(10)
    chance = model.translate(cells, "atac")
    assert ((chance > 0) & (chance < 1)).all()
    assert (model.translate(cells, "rna") > 0).all()
    with pytest.raises(ValueError, match="rna, atac, not 'protein'"):
        model.translate(cells, "protein")
