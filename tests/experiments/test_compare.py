"""The comparison keeps, of each rival, the setting that was best over all seeds, and ended with all."""

import json

from experiments.compare import keep_best

FINALS = {(0.01, 0.9): [0.90, 0.96], (0.03, 0.9): [0.99, 0.10], (0.03, 0.0): [0.92, 0.93], (0.1, 0.9): [0.98]}


def test_the_best_on_average_is_kept_and_the_others_are_put_aside(tmp_path):
    sweep = tmp_path / "fedavg"
    (tmp_path / "other-settings").mkdir()
    runs = [(setting, final) for setting, finals in FINALS.items() for final in finals]
    for number, ((lr, momentum), final) in enumerate(runs):
        run = sweep / str(number)
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"strategy:\n  lr: {lr}\n  momentum: {momentum}\n")
        (run / "summary.json").write_text(json.dumps({"final_accuracy": final}))
    keep_best(sweep, ["strategy.lr", "strategy.momentum"])
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1"]
    assert len(list((tmp_path / "other-settings").iterdir())) == 5
