"""What the driver of a training keeps in mind of its workers. No Ray."""

from cellray.train.loop import Board


def test_a_checkpoint_that_nobody_told_of_is_a_gain_when_it_is_gone_on_from():
    board = Board()
    board.push({"stage": "joint", "saved": 3})
    board.push({"stage": "joint", "resumed": 3})
    assert board.gained() == 1
    board.push({"stage": "joint", "resumed": 4})  # its writer was killed before it could say so
    assert board.gained() == 2
    board.push({"stage": "joint", "resumed": 4})
    assert board.gained() == 2
    assert [event.get("saved", event.get("resumed")) for event in board.take()] == [3, 3, 4, 4]
