"""Tables in LaTeX, compiled, whatever users call things."""

import shutil
import subprocess

import pytest

from pisa_fl.results.report.latex import ACCENTS, LETTERS, MATHEMATICS, escaped, latex
from pisa_fl.results.report.tables import Cell, Table

AWKWARD = (
    r"100 % & a_b^c #1 $x$ {y} ~z \input{none} \\ <a|b> `q' ``r'' --lr",
    "[5, 5]",  # at the beginning of a line
    "*",
    "λ 0.1 ± µ, Łódź naïve ½ 数据 🙂 \u202e \x1b Ωmega – …",
    "".join(MATHEMATICS) + "".join(LETTERS),
    "".join(f"{letter}{accent} " for letter in "aeo" for accent in ACCENTS),
)


def test_text_is_ascii_and_says_what_it_said():
    assert escaped("a_b 5 % [0.9] λ é ± --x") == r"a\_b 5 \% {[}0.9] $\lambda$ \'{e} $\pm$ -{}-x"
    assert escaped("数\u202e") == "U+6570\\textbackslash{}u202e"
    assert all(escaped(text).isascii() for text in AWKWARD)


def test_it_compiles(tmp_path):
    engine = shutil.which("pdflatex")
    if engine is None or subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode:
        pytest.skip("pdflatex with booktabs is not installed (Debian: texlive-latex-recommended)")
    body = [[Cell(text), Cell(text, best=True)] for text in AWKWARD]
    table = latex(Table(AWKWARD[0], AWKWARD[:2], body))
    document = rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{table}\end{{document}}"
    (tmp_path / "a.tex").write_text(document, encoding="ascii")
    line = [engine, "-draftmode", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
    ended = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert ended.returncode == 0, ended.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "a.log").read_text(errors="replace")
