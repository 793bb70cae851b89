import numpy as np
import pytest
import torch

from cellray.data.modalities import scaled
from cellray.model.student import KINDS, POSITIONS, TOGETHER, build, together
from tests import tiny

CONTEXT = tiny.SIZES["transformer"]["context"]


@pytest.fixture(scope="module", params=list(KINDS))
def student(request):
    return tiny.embedder(kind=request.param).student


def modalities():
    return {name: (v.modality, len(v)) for name, v in tiny.tokenizer().vocabularies.items()}


def tensors(cells):
    """What a student is given of these counts."""
    values = scaled(cells.counts, np.repeat(cells.total, cells.lengths), "log1p_cp10k")
    return (
        torch.from_numpy(cells.ids.astype(np.int64)),
        torch.from_numpy(values),
        torch.from_numpy(cells.offsets[:-1]),
        torch.from_numpy(np.log1p(cells.total).astype(np.float32)),
    )


def mixed(lengths, seed=0):
    """Cells with the first so many tokens of some cells."""
    whole = tiny.tokens(len(lengths), seed=seed)
    rows = [np.arange(first, last)[:n] for first, last, n in zip(
        whole.offsets[:-1], whole.offsets[1:], lengths, strict=True)]  # fmt: skip
    index = np.concatenate(rows)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return type(whole)(offsets, whole.ids[index], whole.counts[index], whole.total)


def test_it_says_of_every_modality_what_is_asked(student):
    with torch.inference_mode():
        said = student(*tensors(tiny.tokens(7)))
        assert said.embedding.shape == (7, 16)
        assert set(said.summaries) == set(said.log_variances) == {"atac"}
        assert said.summaries["atac"].shape == said.log_variances["atac"].shape == (7, 16)
        assert student.decode(said.embedding, "rna").shape == (7, len(tiny.GENES))
        assert student.decode(said.embedding, "atac").shape == (7, len(tiny.PEAKS))


def test_path_and_answers_are_all_it_is_made_of(student):
    parts = [p for module in (*student.path(), *student.answers()) for p in module.parameters()]
    assert len({id(p) for p in parts}) == len(parts)
    assert {id(p) for p in parts} == {id(p) for p in student.parameters()}


def test_its_sizes_make_one_that_its_weights_fit(student):
    other = build(student.kind, modalities(), student.sizes)
    other.load_state_dict(student.state_dict(), strict=True)
    assert other.sizes == student.sizes
    assert type(other) is KINDS[student.kind]


def test_embeddings_are_those_of_a_forward_pass(student):
    cells = mixed([0, 3, 200, 1, CONTEXT, CONTEXT - 1, CONTEXT + 1, 200, 17, 0] * 2)
    with torch.inference_mode():
        found, wanted = student.embed(*tensors(cells)), student(*tensors(cells)).embedding
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_cell_has_the_same_bits_with_any_others(student):
    """Cells of every length below, at and above the context, alone and with up to TOGETHER others."""
    rng = np.random.default_rng(1)
    cells = mixed(rng.choice([0, 1, 5, CONTEXT - 1, CONTEXT, CONTEXT + 9, 200], TOGETHER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            whole = student.embed(*tensors(cells))
            for number in (1, 1, 1, 2, 7, 33, TOGETHER):
                rows = rng.permutation(TOGETHER)[:number]
                assert torch.equal(student.embed(*tensors(cells.take(rows))), whole[rows])
    finally:
        torch.set_num_threads(threads)


def test_the_transformer_attends_to_the_first_tokens_and_gathers_all():
    student = tiny.embedder(kind="transformer").student
    cells = tiny.tokens(1)
    ids, values, offsets, depth = tensors(cells)
    assert len(ids) > CONTEXT + 2
    tail = torch.cat([torch.arange(CONTEXT), torch.arange(CONTEXT, len(ids)).flip(0)])
    swapped = torch.arange(len(ids))
    swapped[0], swapped[-1] = len(ids) - 1, 0
    with torch.inference_mode():
        said = student(ids, values, offsets, depth).embedding
        same = student(ids[tail], values[tail], offsets, depth).embedding
        other = student(ids[swapped], values[swapped], offsets, depth).embedding
        fewer = student(ids[:-1], values[:-1], offsets, depth).embedding
    torch.testing.assert_close(said, same, atol=1e-6, rtol=1e-5)
    assert (said - other).abs().max() > 1e-5
    assert (said - fewer).abs().max() > 1e-5


def test_so_many_whole_cells_run_together_that_a_core_is_busy():
    assert [together(context) for context in (1, 32, 60, 512, 2048)] == [64, 16, 16, 1, 1]
    for context in range(1, 600):
        size = together(context)
        assert TOGETHER % size == 0
        assert size == 1 or size * (context + 1) <= POSITIONS


def test_what_no_student_is_made_with_is_refused():
    with pytest.raises(ValueError, match="no student of the kind 'forest', only of mlp, transformer"):
        build("forest", modalities(), {"width": 16})
    with pytest.raises(ValueError, match=r"kind 'transformer' has no sizes.*hidden"):
        build("transformer", modalities(), tiny.SIZES["mlp"])
