"""The table of preconditioners has a row for each federation, of numbers that are right."""

from experiments import preconditioners


def test_a_row_for_each_federation(monkeypatch, capsys):
    monkeypatch.setattr(preconditioners, "ROUNDS", (1, 3))
    preconditioners.main(["model=logistic", "engine.workers=0", "--only", "adafactor"])
    heads, _, *rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert heads[2:4] == ["round 1", "round 3"]
    assert [row[1] for row in rows] == list(preconditioners.FEDERATIONS)
    assert all(float(row[3]) > 30 for row in rows[:1])
    d = 7850
    state, sent = {row[-2] for row in rows}, {row[-1] for row in rows}
    assert state == {f"{4 * (784 + 10 + 10 + 1) / 1e6:.3f}"}
    assert sent == {f"{2 * 4 * d / 1e6:.2f}"}
