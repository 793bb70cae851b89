"""The networks of the published design that ours is compared with, beside plain ones."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cellray.model.decoder import Decoder
from cellray.model.reference import (
    CLASSES,
    GROUP,
    Concatenation,
    GeneEncoder,
    GeneStates,
    LinearDecoder,
    PeakEncoder,
    linear_attention,
    value_classes,
)


@settings(max_examples=30, derandomize=True)
@given(st.data())
def test_value_classes_are_those_of_a_loop(data):
    genes = data.draw(st.integers(1, 12))
    cell = st.dictionaries(st.integers(0, genes - 1), st.floats(0.125, 9, width=32))
    cells = data.draw(st.lists(cell, max_size=5))
    wanted = torch.zeros(len(cells), genes, dtype=torch.int64)
    for i, cell in enumerate(cells):
        for gene, value in cell.items():
            wanted[i, gene] = min(max(round(value), 1), 5)
    starts = np.cumsum([0, *map(len, cells)], dtype=np.int64)[: len(cells)]
    ids = torch.tensor([gene for cell in cells for gene in cell], dtype=torch.int64)
    values = torch.tensor([value for cell in cells for value in cell.values()], dtype=torch.float32)
    found = value_classes(ids, values, torch.from_numpy(starts), genes)
    assert torch.equal(found, wanted)
    assert CLASSES == 6


def test_linear_attention_is_the_mean_over_all_pairs():
    torch.manual_seed(0)
    q, k, v = torch.rand(2, 3, 7, 4), torch.rand(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    weights = q @ k.transpose(-1, -2)
    wanted = (weights / weights.sum(dim=-1, keepdim=True)) @ v
    torch.testing.assert_close(linear_attention(q, k, v), wanted, atol=1e-5, rtol=1e-5)


def test_cells_in_groups_equal_cells_alone():
    torch.manual_seed(0)
    genes = GROUP // 3
    encoder, classes = GeneEncoder(genes, 8, 1, 2), torch.randint(CLASSES, (5, genes))
    with torch.inference_mode():
        whole = encoder(classes)
        alone = torch.cat([encoder(cell[None]) for cell in classes])
        assert encoder(classes[:0]).shape == (0, 8)
    assert len(encoder.states.groups(classes)) == 2
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=1e-5)


def test_genes_see_each_other():
    torch.manual_seed(0)
    states, classes = GeneStates(30, 16, 1, 2), torch.randint(CLASSES, (1, 30))
    other = classes.clone()
    other[0, 3] = (other[0, 3] + 1) % CLASSES
    with torch.inference_mode():
        assert not torch.equal(states(classes)[0, 20], states(other)[0, 20])


def test_open_peaks_equal_a_dense_product():
    torch.manual_seed(0)
    encoder, dense = PeakEncoder(20, 8), (torch.rand(6, 20) < 0.3).float()
    dense[2] = 0
    ids = torch.cat([row.nonzero().squeeze(1) for row in dense])
    starts = torch.cat([torch.zeros(1), dense.sum(dim=1).cumsum(0)[:-1]]).long()
    with torch.inference_mode():
        wanted = encoder.body(dense @ encoder.peak.weight + encoder.bias)
        torch.testing.assert_close(encoder(ids, starts), wanted, atol=1e-5, rtol=1e-5)


def test_the_joint_vector_is_linear_in_both_and_an_absent_one_changes_nothing():
    torch.manual_seed(0)
    fusion, pair = Concatenation(8), torch.randn(4, 2, 8)
    both = torch.ones(4, 2, dtype=torch.bool)
    weight, bias = fusion.joint.weight, fusion.joint.bias
    with torch.inference_mode():
        wanted = pair[:, 0] @ weight[:, :8].T + pair[:, 1] @ weight[:, 8:].T + bias
        torch.testing.assert_close(fusion(pair, both), wanted, atol=1e-5, rtol=1e-5)
        one = torch.tensor([[True, False]]).expand(4, 2)
        strange = torch.where(one[..., None], pair, float("nan"))
        assert torch.equal(fusion(strange, one), fusion(pair, one))


def test_linear_decoders_are_linear_and_can_be_inherited():
    torch.manual_seed(0)
    old, new = LinearDecoder(30, 16, "negative_binomial"), LinearDecoder(30, 16, "negative_binomial")
    with torch.no_grad():
        old.bias.normal_()
        old.depth.weight.normal_()
    cell, ids, mean = torch.randn(5, 16), torch.tensor([3, 29, 0]), np.full(16, 0.7, np.float32)
    new.inherit(old, mean, 2.5)
    with torch.inference_mode():
        depth = old.log_depth(cell)
        wanted = cell @ old.feature.weight.T + old.bias + (old.slope * depth)[:, None]
        torch.testing.assert_close(old(cell), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(old(cell, ids), wanted[:, ids], atol=1e-5, rtol=1e-5)
        moved = (cell - torch.from_numpy(mean)) / 2.5
        torch.testing.assert_close(new(moved), wanted, atol=1e-4, rtol=1e-4)
    assert set(dict(old.named_parameters())) < set(dict(Decoder(30, 16, "bernoulli").named_parameters())) | {
        "dispersion"
    }
