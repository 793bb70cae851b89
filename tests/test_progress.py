import io
import re

import pytest

from cellray.train.progress import PLAIN_SECONDS, Progress, _short, time_text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def visible(text):
    """The lines that are left on a screen after `text`."""
    text = re.sub(r"\x1b\[\d+m", "", text)
    return [line.rpartition("\x1b[K")[2].rpartition("\r")[2] for line in text.split("\n")]


def run(progress, clock, seconds=100, total=200):
    line = progress.stage("joint", total=total)
    for second in range(seconds):
        clock.now += 1
        line.update(second + 1, cells_per_second=12345.6, tokens_per_second=1.234e6, loss=0.4321)
    return line


METERS = {
    "loss": 0.2143,
    "cells_per_second": 11_870.0,
    "tokens_per_second": 1.19e6,
    "data_wait_share": 0.0031,
    "packing": 0.941,
    "mfu": 0.4149,
    "peak_memory_bytes": 12.4e9,
}


def test_plain_text_has_few_lines_and_no_control_characters(clock):
    out = io.StringIO()
    with Progress(out=out, clock=clock) as progress:
        run(progress, clock).finish("held out 0.44")
    lines = out.getvalue().splitlines()
    assert len(lines) == 100 / PLAIN_SECONDS + 1
    assert lines[0] == (
        "joint          5% (10 of 200 steps)  loss 0.432  12.3k cells/s  1.23M tok/s  3:10 left"
    )
    assert "200 steps in 1:40" in lines[-1]
    assert lines[-1].endswith("1.23M tok/s  held out 0.44")
    assert not [sign for sign in out.getvalue() if ord(sign) < 32 and sign != "\n"]


def test_a_terminal_shows_one_line_a_stage(clock, terminal):
    with Progress(out=terminal, clock=clock) as progress:
        run(progress, clock).finish()
        run(progress, clock, seconds=50)
        moving = visible(terminal.getvalue())
        assert len(moving) == 2
        assert "━━━━" in moving[1]
        assert " 25%  loss 0.432  12.3k cells/s" in moving[1]
        assert moving[1].endswith("2:30 left")
        progress.say("a note")
    lines = visible(terminal.getvalue())
    assert [line.split()[0] for line in lines[:-1]] == ["joint", "a", "joint"]
    assert "✓ 200 steps in 1:40" in lines[0]
    assert "✗ stopped at 50 of 200 steps" in lines[2]
    assert lines[-1] == ""


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 100, 120, 200])
def test_a_moving_line_fits_the_terminal(columns, clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    progress = Progress(out=terminal, clock=clock)
    run(progress, clock)
    line = visible(terminal.getvalue())[-1]
    assert len(line) < columns
    assert "50%" in line
    assert ("1:40" in line) == (columns >= 40)
    assert ("loss" in line) == (columns >= 60)
    assert ("tok" in line) == (columns >= 60)


@pytest.mark.parametrize(
    ("name", "rates", "left"),
    [("joint", "11.9k cells/s  1.19M tok/s", "0:42"), ("unimodal-protein", "11.9k cells  1.19M tok", "0:42")],
)
def test_every_meter_fits_100_columns(name, rates, left, clock, terminal):
    line = Progress(out=terminal, clock=clock).stage(name, total=1200)
    clock.now += 69
    line.update(744, **METERS)
    drawn = visible(terminal.getvalue())[-1]
    assert drawn == f"{name:12}  62%  loss 0.214  {rates}  wait 0%  pack 94%  MFU 41%  12.4GB  {left}"
    assert len(drawn) < 100


@pytest.mark.parametrize("columns", range(20, 140, 7))
def test_what_is_missed_least_is_left_out_first(columns, clock, terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    line = Progress(out=terminal, clock=clock).stage("unimodal-protein", total=1200)
    clock.now += 69
    line.update(744, **METERS)
    signs = ("GB", "pack", "tok", "wait", "MFU", "cells", "loss", "0:42")
    shown = [sign in visible(terminal.getvalue())[-1] for sign in signs]
    assert shown == sorted(shown)
    line.finish()
    drawn, done = visible(terminal.getvalue())[-2:]
    assert max(len(drawn), len(done)) < max(columns, 42)


def test_a_meter_that_is_not_known_is_left_out(clock):
    out = io.StringIO()
    with Progress(out=out, clock=clock) as progress:
        line = progress.stage("joint", total=2)
        clock.now += PLAIN_SECONDS
        line.update(1, **(METERS | {"mfu": None}))
    assert "MFU" not in out.getvalue()
    assert "pack 94%" in out.getvalue()


def test_a_resumed_stage_counts_its_own_pace(clock, terminal):
    progress = Progress(out=terminal, clock=clock)
    line = progress.stage("joint", total=200, done=150)
    clock.now += 10
    line.update(160)
    assert visible(terminal.getvalue())[-1].endswith(" 80%  0:40 left")
    line.finish()
    assert "50 steps in 0:10" in visible(terminal.getvalue())[0]


def test_no_color_is_respected(clock, terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(out=terminal, clock=clock) as progress:
        run(progress, clock).finish()
    assert not re.search(r"\x1b\[\d+m", terminal.getvalue())


def test_a_dumb_terminal_gets_plain_text(clock, terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(out=terminal, clock=clock) as progress:
        run(progress, clock).finish()
    assert "\x1b" not in terminal.getvalue()


def test_a_terminal_without_the_signs_gets_others(clock, terminal):
    terminal.encoding = "ascii"
    with Progress(out=terminal, clock=clock) as progress:
        run(progress, clock).finish()
    assert terminal.getvalue().isascii()


def test_quiet_says_nothing(clock):
    out = io.StringIO()
    with Progress("quiet", out=out, clock=clock) as progress:
        progress.say("a note")
        run(progress, clock).finish()
        run(progress, clock)
    assert out.getvalue() == ""


def test_an_error_in_a_stage_leaves_a_whole_line(clock, terminal):
    progress = Progress(out=terminal, clock=clock)
    with pytest.raises(ZeroDivisionError), progress:
        run(progress, clock).update(1 // 0)
    assert terminal.getvalue().endswith("loss 0.432  12.3k cells/s  1.23M tok/s\n")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0"), (9.94, "9.9"), (12.3, "12"), (1234.5, "1,234"), (9999.4, "9,999"), (9999.5, "10k"),
     (123_456, "123k"), (999_499, "999k"), (999_999, "1M"), (1_234_567, "1.23M"), (3e12, "3000G")],
)  # fmt: skip
def test_numbers_are_short(number, text):
    assert _short(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (102, "1:42"), (4000, "1:06:40")])
def test_times_are_minutes_and_hours(seconds, text):
    assert time_text(seconds) == text
