"""The comparison of whole training steps, each kind in a process of its own."""

import sys
import types

import pytest

from benchmarks import steps


def test_steps_are_made_in_a_process_of_their_own():
    turn = steps._start(0, (32, 1, 1, "cpu"))
    assert all(steps._seconds(turn) > 0 for _ in range(2))
    turn.send(False)
    with pytest.raises(EOFError):
        turn.recv()


def test_steps_take_turns(monkeypatch, capsys):
    """Ratios are those of one round; the first round does not count."""
    turns = []
    seconds = [[9, 9, 9, 9], [2, 1, 4, 1], [8, 6, 8, 2], [2, 3, 2, 1]]

    def measured(turn):
        number = len(turns)
        turns.append(turn)
        return seconds[number // 4][number % 4]

    monkeypatch.setattr(steps, "_start", lambda number, settings: types.SimpleNamespace(number=number, send=bool))
    monkeypatch.setattr(steps, "_seconds", measured)
    monkeypatch.setattr(sys, "argv", ["steps", "--crop=32", "--blocks=1", "--rounds=3", "--device=cpu"])
    steps.main()
    assert [turn.number for turn in turns] == [0, 1, 2, 3] * 4
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-4:]]
    assert rows == [
        ["ours", "2.00", "2.00", "1.00"],
        ["plain autograd", "3.00", "1.00", "0.75"],
        ["plain autograd, reference operators", "4.00", "2.00", "1.00"],
        ["ours, bfloat16", "1.00", "1.00", "0.50"],
    ]
