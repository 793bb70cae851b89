import pickle
import re
import shutil

import h5py
import mudata
import numpy as np
import pyarrow as pa
import pytest

from cellray.data.plan import survey
from cellray.train.recipe import Recipe, override
from tests.files import anndata, poisson, table, write


def plan(tmp_path, *rows, **settings):
    recipe = Recipe(atlas=table(tmp_path / "atlas.csv", *rows))
    return survey(override(recipe, {key.replace("__", "."): value for key, value in settings.items()}))


def rows_of(**files):
    """A row for each modality of data set d."""
    return [{"dataset": "d", "modality": name, "url": f"{url}.h5ad"} for name, url in files.items()]


def names(prefix, *numbers):
    return [f"{prefix}{n}" for n in numbers]


@pytest.fixture
def pair(tmp_path):
    """rna.h5ad with cells 0 … 9 and atac.h5ad with cells 14 … 5."""
    write(anndata(poisson(10, 6)), tmp_path / "rna.h5ad")
    cells, peaks = names("c", *range(14, 4, -1)), [f"chr1-{i}00-{i}50" for i in range(4)]
    write(anndata(poisson(10, 4), cells=cells, features=peaks), tmp_path / "atac.h5ad")
    return rows_of(rna="rna", atac="atac")


def test_cells_of_a_data_set_are_those_of_all_its_files_joined_by_name(tmp_path, pair):
    (group,) = plan(tmp_path, *pair).groups
    assert group.cells.tolist() == names("c", *range(10), *range(14, 9, -1))
    rna, atac = group.parts
    assert rna.cells.tolist() == list(range(10))
    assert group.cells.take(pa.array(atac.cells)).tolist() == names("c", *range(14, 4, -1))
    assert atac.features.names[1] == "chr1:100-150"


def test_features_are_named_as_the_vocabulary_names_them_and_repeats_join(tmp_path):
    genes = ["ENSG00000000003.15", "TP53", "ENSG00000000003.1"]
    data = anndata(poisson(3, 3), features=genes, var={"symbol": ["TSPAN6", "TP53", "again"]})
    write(data, tmp_path / "rna.h5ad")
    features = plan(tmp_path, *rows_of(rna="rna")).groups[0].parts[0].features
    assert features.names.tolist() == ["ENSG00000000003", "TP53"]
    assert features.columns.tolist() == [0, 1, 0]
    assert features.symbols.tolist() == ["TSPAN6", ""]
    assert features.about["kinds"] == {"versioned id": 2, "own name": 1}


def test_what_is_known_of_a_cell_is_merged_from_all_files(tmp_path, pair):
    write(anndata(poisson(10, 6), obs={"type": [*"aaaaabbbb", np.nan]}), tmp_path / "rna.h5ad")
    rna, atac = pair
    (group,) = plan(tmp_path, rna | {"label": "type", "assay": "=v3"}, atac | {"tissue": "=brain"}).groups
    assert group.about["label"].tolist() == [*"aaaaabbbb", "", *[""] * 5]
    assert group.about["assay"].tolist() == ["v3"] * 10 + [""] * 5
    assert group.about["tissue"].tolist() == [""] * 5 + ["brain"] * 10


def test_a_cell_takes_few_bytes_in_a_plan(tmp_path):
    sizes = []
    for cells in (300, 1300):
        obs = {"type": [f"a long name of cell type {i % 60}" for i in range(cells)]}
        barcodes = [f"{i:016d}-1" for i in range(cells)]
        write(anndata(poisson(cells, 3), cells=barcodes, obs=obs), tmp_path / "rna.h5ad")
        (row,) = rows_of(rna="rna")
        (group,) = plan(tmp_path, row | {"label": "type"}).groups
        sizes.append(len(pickle.dumps(group)))
    # The name and its offset, six fields, the row of the file.
    assert (sizes[1] - sizes[0]) / 1000 < 18 + 8 + 6 + 4 + 1


def test_a_column_may_be_in_one_of_the_files_whose_rows_name_it(tmp_path, pair):
    write(anndata(poisson(10, 6), obs={"type": ["a"] * 10}), tmp_path / "rna.h5ad")
    (group,) = plan(tmp_path, *(row | {"label": "type"} for row in pair)).groups
    assert group.about["label"].tolist() == ["a"] * 10 + [""] * 5


def test_a_label_column_that_no_file_has_is_refused(tmp_path, pair):
    write(anndata(poisson(10, 6), obs={"cell_type": ["a"] * 10}), tmp_path / "rna.h5ad")
    with pytest.raises(
        ValueError, match=r"atlas\.csv line 2: label: .*rna\.h5ad: obs has no column 'celltype'"
    ) as e:
        plan(tmp_path, *(row | {"label": "celltype"} for row in pair))
    assert "Did you mean 'cell_type'?" in str(e.value)


def test_files_that_contradict_each_other_on_a_cell_are_refused_by_name(tmp_path, pair):
    with pytest.raises(ValueError, match="5 cells have another species") as error:
        plan(tmp_path, pair[0] | {"species": "=human"}, pair[1] | {"species": "=mouse"})
    for part in ("rna.h5ad", "atac.h5ad", "c9: 'mouse' and 'human'"):
        assert part in str(error.value)


def test_a_modality_file_whose_cells_match_nothing_is_refused(tmp_path, pair):
    write(anndata(poisson(4, 5), cells=names("c", 0, 1, 2, 3), features=list("pqrst")), tmp_path / "rna.h5ad")
    with pytest.raises(
        ValueError, match=r"no cell of .*atac\.h5ad is in another file of data set 'd'"
    ) as error:
        plan(tmp_path, *pair)
    assert "named like 'c14', those of" in str(error.value)
    assert "a data set of its own" in str(error.value)


def test_the_first_modality_may_have_files_that_match_nothing_others_may_not(tmp_path, pair):
    write(anndata(poisson(4, 6), cells=names("x", *range(4))), tmp_path / "more.h5ad")
    more = {"dataset": "d", "url": "more.h5ad"}
    assert len(plan(tmp_path, *pair, more | {"modality": "rna"}).groups[0].cells) == 19
    with pytest.raises(ValueError, match=r"no cell of .*more\.h5ad"):
        plan(tmp_path, *pair, more | {"modality": "protein"})
    write(anndata(poisson(4, 6), cells=names("c", 11, 12, 13, 14)), tmp_path / "more.h5ad")
    first_alone = [pair[0] | {"url": "alone.h5ad"}, pair[1], more | {"modality": "protein"}]
    write(anndata(poisson(4, 6), cells=names("z", *range(4))), tmp_path / "alone.h5ad")
    with pytest.raises(ValueError, match=r"no cell of .*alone\.h5ad"):
        plan(tmp_path, *first_alone)


def test_several_files_of_one_modality_must_not_share_cells(tmp_path):
    write(anndata(poisson(4, 6)), tmp_path / "one.h5ad")
    write(anndata(poisson(4, 6), cells=names("x", *range(4))), tmp_path / "two.h5ad")
    both = [{"dataset": "d", "modality": "rna", "url": f"{name}.h5ad"} for name in ("one", "two")]
    assert len(plan(tmp_path, *both).groups[0].cells) == 8
    write(anndata(poisson(4, 6), cells=["c3", "y1", "y2", "y3"]), tmp_path / "two.h5ad")
    with pytest.raises(ValueError, match=r"1 cells of .*two\.h5ad are in .*one\.h5ad too, such as 'c3'"):
        plan(tmp_path, *both)


def test_a_row_without_modality_stands_for_all_of_a_mudata_file(tmp_path):
    with mudata.set_options(pull_on_update=False):
        data = mudata.MuData(
            {"rna": anndata(poisson(5, 3)), "prot": anndata(poisson(4, 2), features=["CD3", "CD4"])}
        )
        data.obs["type"] = list("abcde")
        write(data, tmp_path / "m.h5mu")
        data = mudata.MuData({"rna": data["rna"], "hto": data["prot"]})
        write(data, tmp_path / "odd.h5mu")
    found = plan(tmp_path, {"dataset": "d", "url": "m.h5mu", "label": "type"})
    assert [m.name for m in found.modalities] == ["rna", "protein"]
    assert sorted(part.file.modality for part in found.groups[0].parts) == ["protein", "rna"]
    group = found.groups[0]
    of = dict(zip(group.cells.tolist(), group.about["label"].tolist(), strict=True))
    assert of == {f"c{i}": letter for i, letter in enumerate("abcde")}
    with pytest.raises(ValueError, match=r"odd\.h5mu holds hto, rna; 'hto' is none of"):
        plan(tmp_path, {"dataset": "d", "url": "odd.h5mu"})
    only = plan(tmp_path, {"dataset": "d", "url": "odd.h5mu", "modality": "rna"})
    assert [m.name for m in only.modalities] == ["rna"]


def test_peaks_are_not_taken_for_genes(tmp_path, pair):
    with pytest.raises(ValueError, match="holds peaks such as 'chr1-000-050', not genes"):
        plan(tmp_path, {"dataset": "d", "url": "atac.h5ad"})


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_a_file_without_cells_or_features_is_refused(tmp_path, shape):
    write(anndata(np.zeros(shape, np.float32)), tmp_path / "rna.h5ad")
    with pytest.raises(ValueError, match="there is nothing to read"):
        plan(tmp_path, *rows_of(rna="rna"))


def test_a_label_to_drop_that_no_cell_has_is_refused(tmp_path):
    write(anndata(poisson(4, 6), obs={"type": list("aabb")}), tmp_path / "rna.h5ad")
    rows = [rows_of(rna="rna")[0] | {"label": "type"}]
    found = plan(tmp_path, *rows, ingest__drop_labels="b")
    assert found.dropped["d"].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="drop_labels has 'B', but no cell has this label; there are a, b"):
        plan(tmp_path, *rows, ingest__drop_labels="B")


def test_cells_whose_label_says_nothing_are_kept_without_one(tmp_path):
    write(anndata(poisson(4, 6), obs={"type": list("abcb")}), tmp_path / "rna.h5ad")
    rows = [rows_of(rna="rna")[0] | {"label": "type"}]
    plain = plan(tmp_path, *rows)
    found = plan(tmp_path, *rows, ingest__unlabelled="b", ingest__drop_labels="c")
    assert found.groups[0].about["label"].tolist() == ["a", "", "c", ""]
    assert found.dropped["d"].tolist() == [False, False, True, False]
    assert "unlabelled" not in plain.inputs["ingest"]
    assert found.fingerprint != plan(tmp_path, *rows, ingest__drop_labels="c").fingerprint
    with pytest.raises(ValueError, match="unlabelled has 'B', but no cell has this label; there are a, b, c"):
        plan(tmp_path, *rows, ingest__unlabelled="B")


def test_a_data_set_that_cannot_be_read_is_left_out_and_listed(tmp_path, pair):
    (tmp_path / "bad.h5ad").write_text("<html>not found</html>")
    bad = {"dataset": "bad", "modality": "rna", "url": "bad.h5ad"}
    found = plan(tmp_path, *pair, bad)
    assert [group.name for group in found.groups] == ["d"]
    assert found.failed[0]["dataset"] == "bad"
    assert re.search(r"atlas\.csv line 4: .*bad\.h5ad is a web page", found.failed[0]["reason"])
    with pytest.raises(ValueError, match="no data set of the atlas can be read"):
        plan(tmp_path, bad)


def test_a_file_stored_by_columns_is_read_in_few_units(tmp_path):
    data = anndata(poisson(50, 6))
    data.X = data.X.tocsc()
    write(data, tmp_path / "rna.h5ad")
    assert plan(tmp_path, *rows_of(rna="rna"), ingest__unit_cells=10).groups[0].parts[0].units == [(0, 50)]


def test_units_are_no_smaller_than_what_is_decoded_at_once(tmp_path):
    write(anndata(poisson(50, 6)), tmp_path / "rna.h5ad")
    with h5py.File(tmp_path / "rna.h5ad", "a") as file:
        for name in ("data", "indices"):
            values = file[f"X/{name}"][:]
            del file[f"X/{name}"]
            file["X"].create_dataset(name, data=values, chunks=(30,))
    found = plan(tmp_path, *rows_of(rna="rna"), ingest__unit_cells=20).groups[0].parts[0].units
    assert found == [(0, 20), (20, 40), (40, 50)]
    assert plan(tmp_path, *rows_of(rna="rna"), ingest__unit_cells=1).groups[0].parts[0].step > 5


def test_the_fingerprint_follows_content_and_settings_not_places(tmp_path, pair):
    first = plan(tmp_path, *pair).fingerprint
    other = tmp_path / "elsewhere"
    other.mkdir()
    for name in ("rna", "atac"):
        shutil.copy(tmp_path / f"{name}.h5ad", other / f"{name}.h5ad")
    assert plan(other, *pair).fingerprint == first
    assert plan(tmp_path, *pair, ingest__unit_cells=5, modalities__rna__context=7).fingerprint == first
    assert plan(tmp_path, *pair, ingest__min_cells=2).fingerprint != first
    assert plan(tmp_path, pair[0] | {"tissue": "=eye"}, pair[1]).fingerprint != first
    write(anndata(poisson(10, 6, seed=1)), tmp_path / "rna.h5ad")
    assert plan(tmp_path, *pair).fingerprint != first


def cellxgene(tmp_path, *, normalised):
    obs = {
        **{"cell_type": ["neuron", "glia"] * 3, "donor_id": ["a", "b"] * 3, "assay": ["MERFISH"] * 6},
        **{"organism": ["Mus musculus"] * 6, "tissue": ["cortex"] * 6},
        **{"cell_type_ontology_term_id": ["CL:1"] * 6, "assay_ontology_term_id": ["EFO:1"] * 6},
    }
    genes = [f"ENSMUSG{i:011d}" for i in range(4)]
    data = anndata(poisson(6, 4), obs=obs, var={"feature_name": list("ABCD")}, features=genes)
    if normalised:
        data.raw = data.copy()
        data.X = data.X.log1p()
    write(data, tmp_path / "cxg.h5ad")


@pytest.mark.parametrize("normalised", [False, True])
def test_a_file_of_the_cellxgene_schema_needs_no_setting(tmp_path, normalised):
    cellxgene(tmp_path, normalised=normalised)
    (group,) = plan(tmp_path, {"dataset": "d", "url": "cxg.h5ad"}).groups
    assert group.about["label"].tolist()[:2] == ["neuron", "glia"]
    assert {field: values.tolist()[0] for field, values in group.about.items() if field != "label"} == {
        **{"donor": "a", "batch": "", "assay": "MERFISH", "species": "mouse", "tissue": "cortex"}
    }
    assert group.parts[0].file.layer == ("raw" if normalised else "")
    (group,) = plan(tmp_path, {"dataset": "d", "url": "cxg.h5ad", "label": "=", "assay": "=mine"}).groups
    assert group.about["label"].values == ("",)
    assert group.about["assay"].values == ("mine",)


def test_the_real_file_of_the_cellxgene_schema_needs_no_setting(tmp_path, shared_data):
    (path,) = (shared_data / "spatial_merfish_brain_cxg").glob("*.h5ad")
    (group,) = plan(tmp_path, {"dataset": "merfish", "url": str(path)}).groups
    assert len(group.cells) == 1000
    assert len(group.about["label"].values) == 21
    assert group.about["species"].values == ("mouse",)
    assert all(name.startswith("ENSMUSG") for name in group.parts[0].features.names)


def test_tables_of_data_sets_that_share_cell_names_stay_apart(tmp_path):
    write(anndata(poisson(4, 6)), tmp_path / "one.h5ad")
    write(anndata(poisson(4, 6)), tmp_path / "two.h5ad")
    groups = plan(tmp_path, *({"dataset": name, "url": f"{name}.h5ad"} for name in ("one", "two"))).groups
    assert [len(group.cells) for group in groups] == [4, 4]


def test_labels_come_from_one_modality(tmp_path, pair):
    assert plan(tmp_path, *(row | {"label_from": "atac"} for row in pair)).groups[0].label_from == "atac"
    with pytest.raises(ValueError, match="label_from atac and rna"):
        plan(tmp_path, pair[0] | {"label_from": "rna"}, pair[1] | {"label_from": "atac"})


def species_of(tmp_path, *rows, **settings):
    found = plan(tmp_path, *rows, **settings)
    return {group.name: group.species for group in found.groups}, [entry["reason"] for entry in found.failed]


def rna(tmp_path, name, features, **more):
    write(anndata(poisson(12, len(features)), features=features), tmp_path / f"{name}.h5ad")
    return {"dataset": name, "modality": "rna", "url": f"{name}.h5ad"} | more


def test_the_species_is_told_by_the_genes_and_must_not_contradict_the_atlas(tmp_path):
    human, mouse = ([f"{prefix}{i:011d}" for i in range(9)] for prefix in ("ENSG", "ENSMUSG"))
    told, failed = species_of(
        tmp_path,
        rna(tmp_path, "a", human),
        rna(tmp_path, "b", mouse, species="=mouse"),
        rna(tmp_path, "c", mouse, species="=human"),
        rna(tmp_path, "d", human + mouse),
    )
    assert told == {"a": "human", "b": "mouse"}
    assert "said to be human, but the genes in" in failed[0]
    assert "human and mouse together" in failed[1]


def test_names_of_two_species_do_not_meet_without_tables(tmp_path):
    rows = [rna(tmp_path, name, list("ABC"), species=f"={name}") for name in ("human", "mouse")]
    with pytest.raises(ValueError, match=r"several species .*'human' of human.*ingest\.genes"):
        plan(tmp_path, *rows)
    assert species_of(tmp_path, rows[0])[0] == {"human": "human"}
    peaks = [row | {"modality": "atac"} for row in rows]
    for row in peaks:
        data = anndata(poisson(5, 3), features=["chr1-0-50", "chr1-50-90", "chr2-3-9"])
        write(data, tmp_path / row["url"])
    with pytest.raises(ValueError, match=r"several species.*atac.*ingest\.peaks=bins"):
        plan(tmp_path, *peaks)
    groups = plan(tmp_path, *peaks, ingest__peaks="bins:1000").groups
    assert [group.parts[0].features.names.tolist() for group in groups] == [
        [f"{name}:chr1:0-1000", f"{name}:chr2:0-1000"] for name in ("human", "mouse")
    ]


def test_where_names_hang_on_the_species_it_has_to_be_known(tmp_path):
    row = rna(tmp_path, "d", ["chr1-0-50", "chr1-50-90"], modality="atac")
    assert "write species in the atlas" in plan_failure(tmp_path, row, ingest__peaks="bins:1000").lower()


def plan_failure(tmp_path, *rows, **settings):
    with pytest.raises(ValueError, match="no data set of the atlas can be read") as error:
        plan(tmp_path, *rows, **settings)
    return str(error.value)
