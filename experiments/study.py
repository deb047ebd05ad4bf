"""A study: one question, put to several methods in several settings, everything else equal. One command, one report.

    python -m experiments.study skew
    python -m experiments.study skew seed=0 data=mnist data.root=FOLDER --settings iid --methods pisa fedavg
    python -m experiments.study skew --dry

What a study is stands in `experiments/NAME/study.yaml` (`Study`); what it shows, in the README.md beside it. Every
method is a sweep over the seeds in each setting, and goes on where it was interrupted. The report is of everything that
has been run so far, in `runs/studies/NAME`. Beside it lies `signed.csv`, a line a run: a hash of its configuration, one
of the bits of its final weights, and its numbers; the last line is a hash of those above. Who runs the same study on
the same kind of processor, with the same versions, has the same file. Further arguments are overrides, given to all;
they come before the options, and count last.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import load_file

from pisa_fl.config.explain import first_line
from pisa_fl.results.claim import quoted
from pisa_fl.results.figures import qualities
from pisa_fl.results.finished import Run, find_runs
from pisa_fl.results.report import report
from pisa_fl.results.settings import identify
from pisa_fl.system.files import write

HERE = Path(__file__).parent
STUDIES = sorted(path.parent.name for path in HERE.glob("*/study.yaml"))
"""Names of all studies."""

KINDS = {
    "question": "a sentence",
    "common": "a list of overrides",
    "seeds": "a list of whole numbers",
    "settings": "lists of overrides, by names",
    "methods": "lists of overrides, by names",
}
"""What the keys of a study's file must be, in words."""


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        question: What is to be found out, in a sentence: the report's title.
        common: Overrides of every run.
        seeds: With which every method is run in every setting.
        settings: Overrides of each setting, by name.
        methods: Overrides of each method, by name. A key with several values (`strategy.lr=0.01,0.03`) is tuned: of its
            runs the report has those of the values whose final quality is best, on average over the seeds.
    """

    question: str
    common: Sequence[str]
    seeds: Sequence[int]
    settings: Mapping[str, Sequence[str]]
    methods: Mapping[str, Sequence[str]]

    @classmethod
    def read(cls, name: str) -> Study:
        """The study of a name.

        Raises:
            ValueError: It lacks something, or has something else; in a sentence.
        """
        path = HERE / name / "study.yaml"
        try:
            said: Any = OmegaConf.to_container(OmegaConf.load(path))
        except Exception as error:  # whatever the file makes the YAML parser raise
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
        keys = [one.name for one in fields(cls)]
        if not isinstance(said, dict) or set(said) != set(keys):
            raise ValueError(f"{path} must have the keys {', '.join(keys)}, and nothing else")
        for key, fits in (
            ("question", isinstance(said["question"], str)),
            ("common", _are_texts(said["common"])),
            ("seeds", isinstance(said["seeds"], list) and all(type(seed) is int for seed in said["seeds"])),
            *((key, isinstance(said[key], dict)) for key in ("settings", "methods")),
        ):
            if not fits or (key != "common" and not said[key]):
                raise ValueError(f"{path}: {key} must be {KINDS[key]}, got {said[key]}")
        for key in ("settings", "methods"):
            for own, overrides in said[key].items():
                if not _are_texts(overrides):
                    raise ValueError(f"{path}: {key}.{own} must be a list of overrides, got {overrides}")
        return cls(**said)

    def sweep(self, setting: str, method: str) -> list[str]:
        """Overrides of all runs of a method in a setting."""
        seeds = "seed=" + ",".join(map(str, self.seeds))
        return [*self.common, *self.settings[setting], *self.methods[method], seeds]

    def tuned(self, method: str) -> list[str]:
        """Keys of a method that are tuned."""
        return [key for key, _, value in (o.partition("=") for o in self.methods[method]) if is_swept(value)]


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def is_swept(value: str) -> bool:
    """Whether an override's value is several."""
    return "," in value and value[0] not in "[{'\""


def best(runs: Sequence[Run], tuned: Sequence[str]) -> list[Run]:
    """Of the runs of one method those with the values of some keys whose final quality is best, on average.

    Values with which a seed did not come to its end are behind all others, and so are those with which one diverged.
    """
    settings: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        config, chosen = OmegaConf.create(dict(run.config)), run.config.get("choices") or {}
        values = tuple(str(chosen[key] if key in chosen else OmegaConf.select(config, key)) for key in tuned)
        settings.setdefault(values, []).append(run)

    def worth(group: list[Run]) -> tuple[float, ...]:
        quality = group[0].measures.quality
        sign = 1 if quality.better == "higher" else -1
        finals = [sign * float(run.metrics[-1][quality.key]) for run in group if not run.diverged]
        return len(finals), mean(finals) if finals else 0.0

    return max(settings.values(), key=worth) if settings else []


def finished(folder: Path) -> list[Run]:
    """The runs of a sweep that came to their end; what is left out is said."""
    try:
        runs, notes = find_runs([folder])
    except ValueError:
        return []
    for note in notes:
        print(note, file=sys.stderr)
    return runs


def signed(runs: Mapping[tuple[str, str], Sequence[Run]]) -> str:
    """The table of the runs of every setting and method that two people can compare, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["setting", "method", "seed", "configuration", "weights", "final", "best"])
    for (setting, method), group in runs.items():
        for run in sorted(group, key=lambda run: run.seed):
            quality = run.measures.quality
            values = qualities(run.metrics, quality)
            best_value = values.max() if quality.better == "higher" else values.min()
            [configuration] = identify([run.config])
            digests = _hash(configuration.encode()), _hash(*_bits(run.directory / "model.safetensors"))
            table.writerow([setting, method, run.seed, *digests, values[-1], best_value])
    return text.getvalue() + f"# {_hash(text.getvalue().encode())}\n"


def _bits(path: Path) -> list[bytes]:
    return [
        part
        for name, tensor in sorted(load_file(path).items())
        for part in (name.encode(), tensor.numpy().tobytes())
    ]


def _hash(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main(arguments: list[str] | None = None) -> None:
    """Run what is left of a study, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="those only")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="those only")
    parser.add_argument("--out", type=Path, help="the folder; runs/studies/STUDY if not given")
    parser.add_argument("--dry", action="store_true", help="only print the commands")
    chosen, overrides = parser.parse_known_args(arguments)
    try:
        study = Study.read(chosen.study)
    except ValueError as error:
        parser.error(str(error))
    for option, names in (("settings", study.settings), ("methods", study.methods)):
        if strange := set(getattr(chosen, option) or ()) - set(names):
            parser.error(f"--{option}: {', '.join(sorted(strange))}: choose from {', '.join(names)}")
    out = chosen.out or Path("runs", "studies", chosen.study)
    for setting, method in product(chosen.settings or study.settings, chosen.methods or study.methods):
        folder = quoted(str(out / setting / method))
        sweep = [f"hydra.sweep.dir={folder}", *study.sweep(setting, method), *overrides]
        command = ["-m", "pisa_fl", "--multirun", *sweep]
        print("python", shlex.join(command), flush=True)
        if not chosen.dry:
            status = subprocess.run([sys.executable, *command]).returncode
            if status not in (0, 1):  # 1: a run ended in error, as one that diverges may; others go on
                sys.exit(status)
    if chosen.dry:
        return
    kept = {
        (setting, method): best(finished(out / setting / method), study.tuned(method))
        for setting, method in product(study.settings, study.methods)
    }
    directories = [run.directory for group in kept.values() for run in group]
    if not directories:
        sys.exit(f"{out} has no finished run")
    print(report(directories, out, study.question))
    write(out / "signed.csv", signed(kept))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
