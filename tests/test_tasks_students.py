from dataclasses import replace

import numpy as np
import pytest

from cellray.tasks import students
from cellray.train.recipe import Score
from tests import tiny
from tests.scored import made

COST = {"parameters": 1000, "cells_per_cpu_second": 100.0}


def kind(name, rate, cosine=0.9, **probes):
    costs = {"parameters": 1, "cells_per_cpu_second": rate}
    return {"kind": name, **costs, "cosine": cosine, "probes": probes}


def test_kinds_are_compared_on_every_probe():
    scored = made(number=500)
    own, blind = scored.embeddings["student"], scored.embeddings["rna_only"]
    good, bad = students.compare(
        scored, {"good": own, "bad": blind}, {"good": COST, "bad": COST}, Score(seeds=2)
    )
    assert (good["kind"], bad["kind"]) == ("good", "bad")
    assert good["parameters"] == 1000
    assert set(good["probes"]) == set(bad["probes"]) == {students.ACCURACY, "state within label"}
    assert good["cosine"] > bad["cosine"]
    assert good["probes"][students.ACCURACY] > 0.9
    assert good["probes"]["state within label"] > 0.7 > 0.3 > bad["probes"]["state within label"]


def test_scores_are_of_held_out_cells_alone():
    scored = made(number=500)
    test = scored.cells["test"].to_numpy()
    own = scored.embeddings["student"]
    spoilt = own.copy()
    spoilt[test] = np.random.default_rng(0).normal(size=spoilt[test].shape)
    costs = {"whole": COST, "spoilt": COST}
    whole, worse = students.compare(scored, {"whole": own, "spoilt": spoilt}, costs, Score(seeds=1))
    assert abs(worse["probes"]["state within label"]) < 0.3 < whole["probes"]["state within label"]
    assert abs(worse["cosine"]) < 0.3 < whole["cosine"]


def test_without_labels_and_targets_the_cosine_is_left():
    scored = made(number=300)
    scored = replace(scored, cells=scored.cells.assign(label=""), targets=None)
    own = scored.embeddings["student"]
    (found,) = students.compare(scored, {"mlp": own}, {"mlp": COST}, Score(seeds=1))
    assert found["probes"] == {}
    assert found["cosine"] > 0.5
    targets = made(number=300).targets
    (found,) = students.compare(replace(scored, targets=targets), {"mlp": own}, {"mlp": COST}, Score(seeds=1))
    assert set(found["probes"]) == {"state"}


def test_the_cost_is_that_of_the_way_to_an_embedding():
    model = tiny.embedder()
    found = students.cost(model.student, model.tokenizer, tiny.tokens(300))
    bag, hidden = 120 * 16, 24
    layers = 2 * 16 + 2 * 16 + 16 * hidden + hidden  # depth, norm, lift
    layers += 2 * (2 * hidden + 2 * (hidden * hidden + hidden)) + 2 * hidden + hidden * 16 + 16
    assert found["parameters"] == bag + layers
    assert found["cells_per_cpu_second"] > 100
    none = students.cost(model.student, model.tokenizer, tiny.tokens(3).take(np.empty(0, np.int64)))
    assert none["cells_per_cpu_second"] is None


@pytest.mark.parametrize(
    ("cheap", "dear", "taken"),
    [
        ({"accuracy": 0.90}, {"accuracy": 0.91}, "mlp"),
        ({"accuracy": 0.90}, {"accuracy": 0.93}, "transformer"),
        ({"accuracy": 0.9801}, {"accuracy": 1.0}, "mlp"),
        ({"accuracy": 0.9799}, {"accuracy": 1.0}, "transformer"),
        ({"accuracy": 0.95, "state": 0.30}, {"accuracy": 0.95, "state": 0.40}, "transformer"),
        ({"accuracy": 0.95, "state": 0.02}, {"accuracy": 0.95, "state": 0.09}, "mlp"),
        ({"accuracy": 0.95, "state": -0.2}, {"accuracy": 0.90, "state": 0.4}, "transformer"),
        ({}, {}, "mlp"),
    ],
)
def test_the_cheapest_that_keeps_the_gate_is_taken(cheap, dear, taken):
    kinds = [kind("transformer", 50.0, **dear), kind("mlp", 5000.0, **cheap)]
    assert students.choose(kinds)[0] == taken
    assert students.choose(kinds[::-1])[0] == taken


def test_the_choice_says_why():
    kinds = [kind("mlp", 5000.0, accuracy=0.5), kind("transformer", 50.0, accuracy=0.9)]
    name, why = students.choose(kinds)
    assert name == "transformer"
    assert "The mlp is cheaper, but: accuracy 0.500 where the best has 0.900." in why
    assert students.choose(kinds, "mlp") == ("mlp", "score.student asks for it.")
    assert students.choose(kinds[:1]) == ("mlp", "It is the only kind that was trained.")


def test_without_probes_the_cosine_is_the_gate():
    kinds = [kind("mlp", 5000.0, cosine=0.5), kind("transformer", 50.0, cosine=0.9)]
    assert students.choose(kinds)[0] == "transformer"


def test_where_no_kind_keeps_the_gate_the_best_on_average_is_taken():
    kinds = [kind("mlp", 5000.0, accuracy=0.5, state=0.9), kind("transformer", 50.0, accuracy=0.9, state=0.6)]
    name, why = students.choose(kinds)
    assert name == "transformer"
    assert "best on average" in why
