import struct

import pytest

from pipelines.curves import main
from tests.test_fit import quick
from tests.test_trackers import row

PARTS = {"loss/rna": 0.1, "loss/atac": -0.1, "learning_rate": 1e-3, "gradient_norm": None, "seconds": 1.0}
MORE = {"cells": 3, "cells_per_second": 4.0, "packing": 0.9, "data_wait_share": 0.0, **PARTS}


def size(png):
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_a_picture_has_a_column_a_stage(tmp_path, capsys):
    from cellray.train.trackers import Jsonl

    path, widths = tmp_path / "metrics.jsonl", []
    for stage in ("unimodal-rna", "joint"):
        tracker = Jsonl(str(path), path, stage, 0)
        for step in (3, 5):
            tracker.log(step, row(stage, step, **MORE))
        tracker.close()
        assert main([str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path}/curves.png\n"
        widths.append(size((tmp_path / "curves.png").read_bytes())[0])
    assert widths[1] > 1.5 * widths[0]


def test_a_run_without_rows_is_refused(tmp_path, capsys):
    run = quick(tmp_path)
    assert main([run.url]) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"stage": "jo')
    assert main([run.url]) == 2
    assert "has no rows yet" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["a", "b"]])
def test_one_run_is_asked_for(argv):
    with pytest.raises(SystemExit):
        main(argv)
