"""The verdict: its test against SciPy's and against closed forms, and its sentences on runs whose numbers are known."""

import itertools

import numpy as np
import pytest
from test_report import chosen, write_run

from pisa_fl.results.report.latex import latex
from pisa_fl.results.report.paired import Finding, fewest_pairs, holm, least_p, sign_flip
from pisa_fl.results.report.tables import pivot
from pisa_fl.results.runs import load_runs

ALPHAS = ("0.1", "1.0")


def write_pairs(folder, ours, theirs, alpha="0.1", rounds=2):
    """Runs of sisa and fedavg with these final accuracies, a seed each."""
    for strategy, finals in (("sisa", ours), ("fedavg", theirs)):
        for seed, final in enumerate(finals):
            chosen_by = (f"strategy={strategy}", "partition=dirichlet", f"partition.alpha={alpha}")
            path = folder / f"{strategy}-{alpha}-{seed}"
            write_run(path, chosen(*chosen_by, seed=seed), [0.1, *[final] * rounds])


def sentences(runs):
    return [sentence for own in runs.verdict.values() for sentence in own]


@pytest.mark.parametrize("n", [2, 5, 9])
def test_p_is_that_of_the_exact_permutation_test(n):
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(n)
    for shift in (0.0, 0.5, 2.0):
        ours, theirs = draw.normal(shift, 1, n), draw.normal(0, 1, n)
        theirs_says = stats.permutation_test(
            (ours, theirs),
            lambda a, b: np.mean(a - b),
            permutation_type="samples",
            n_resamples=np.inf,
        )
        assert sign_flip(ours - theirs) == pytest.approx(theirs_says.pvalue, abs=1e-12)


def test_p_of_few_or_equal_pairs():
    assert [sign_flip([1.0] * n) for n in range(1, 8)] == [least_p(n) for n in range(1, 8)]
    assert sign_flip([0.3, 0.1, 0.2]) == 0.25
    assert sign_flip([0.1, -0.1]) == 1
    assert sign_flip([0.0, 0.0, 0.0]) == 1
    # all 2^n choices of signs, counted one by one
    values = [0.7, -0.2, 0.4, 0.1]
    means = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip(values) == sum(mean >= abs(sum(values)) - 1e-12 for mean in means) / 16
    # more pairs than all choices can be tried for: the normal limit
    draw = np.random.default_rng(0).normal(0.3, 1, 60)
    assert sign_flip(draw) == pytest.approx(
        2 * (1 - _normal(draw.sum() / np.sqrt((draw**2).sum()))), abs=0.01
    )


def _normal(z):
    from math import erf

    return (1 + erf(z / np.sqrt(2))) / 2


def test_several_tests_and_how_many_seeds_they_take():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert (fewest_pairs(), fewest_pairs(3)) == (6, 7)
    assert least_p(5) > 0.05 > least_p(6)


@pytest.mark.parametrize(
    ("gains", "finding"),
    [
        ([0.02, 0.03, 0.04], Finding.AGREED),
        ([0.02, 0.03, -0.04], Finding.WITHIN),
        ([0.02, 0.03, 0.04, 0.05, 0.02, 0.01], Finding.BEYOND),
        ([0.02, 0.03, -0.04, 0.05, 0.02, 0.01], Finding.WITHIN),
        ([0.02], Finding.UNTOLD),
    ],
)
def test_what_is_found_of_a_difference(tmp_path, gains, finding):
    write_pairs(tmp_path, [0.8 + gain for gain in gains], [0.8] * len(gains))
    text = sentences(load_runs(tmp_path))[0]
    assert text.startswith("sisa ends best, with ")
    assert f"Against fedavg ({100 * sum(gains) / len(gains):+.2f} points" in text
    assert text.endswith(f": {finding}.")


def test_three_seeds_prove_nothing_and_are_said_to(tmp_path):
    for alpha in ALPHAS:
        write_pairs(tmp_path, [0.9] * 3, [0.2] * 3, alpha)
    said = sentences(load_runs(tmp_path))
    assert [text.partition(":")[0] for text in said[:2]] == ["alpha 0.1", "alpha 1.0"]
    assert any(text.startswith("3 seeds can never give p below 0.25, whatever the numbers") for text in said)
    assert any("takes 6 seeds, and with 2 tests 7." in text for text in said)


def test_pairs_are_of_one_deal(tmp_path):
    write_pairs(tmp_path, [0.9, 0.9], [0.8, 0.8])
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        (path / "partition.json").write_text(f'{{"0": [{number}]}}')
    assert sentences(load_runs(tmp_path))[0].endswith(f": {Finding.UNPAIRED}.")


def test_budgets_that_are_unequal_and_the_order_at_the_least(tmp_path):
    write_run(tmp_path / "a", chosen("strategy=sisa", "rounds=4"), [0.1, 0.5, 0.6, 0.7, 0.8], mb=2)
    write_run(tmp_path / "b", chosen("strategy=fedavg", "rounds=2"), [0.1, 0.5, 0.7], mb=1)
    budgets = load_runs(tmp_path).verdict["Budgets"]
    assert budgets == [
        "Unequal rounds: sisa 4, fedavg 2.",
        "At 2 rounds each: fedavg has 70.00, sisa has 60.00 (accuracy, %, means).",
        "Unequal passes over the data: sisa 4, fedavg 2.",
        "At 2 passes over the data each: fedavg has 70.00, sisa has 60.00 (accuracy, %, means).",
        "Unequal MB: sisa 16.0, fedavg 4.0.",
        "At 4.0 MB each: fedavg has 70.00, sisa has 50.00 (accuracy, %, means).",
    ]


def test_best_and_last_round_may_tell_another_story(tmp_path):
    write_run(tmp_path / "a", chosen("strategy=sisa"), [0.1, 0.7, 0.8])
    write_run(tmp_path / "b", chosen("strategy=fedavg"), [0.1, 0.95, 0.6])
    said = load_runs(tmp_path).verdict["Best round and last round"]
    assert said[0] == "By the best round instead of the last fedavg is ahead, with 95.00 % (one seed)."
    assert (
        said[-1]
        == "Worse at the end than in the best round, by more than 2 % of it: fedavg (95.00, then 60.00)."
    )


def test_a_pivot_and_its_latex(tmp_path):
    write_pairs(tmp_path, [0.8, 0.9], [0.7, 0.7], "0.1")
    write_pairs(tmp_path, [0.5], [0.6], "1.0")
    table = pivot(load_runs(tmp_path))
    assert list(table.header) == ["strategy", "alpha 0.1", "alpha 1.0"]
    cells = {cells[0].text: [(cell.text, cell.best) for cell in cells[1:]] for cells in table.body}
    assert cells == {
        "sisa": [("85.00 ± 7.07", True), ("50.00", False)],
        "fedavg": [("70.00 ± 0.00", False), ("60.00", True)],
    }
    text = latex(table)
    assert r"    sisa & \textbf{85.00 $\pm$ 7.07} & 50.00 \\" in text
    assert r"\toprule" in text
    assert r"Final accuracy, \%" in text
