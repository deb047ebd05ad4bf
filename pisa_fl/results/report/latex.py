"""A table in LaTeX, which every engine compiles whatever names users give: text is written in ASCII."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pisa_fl.results.report.tables import Table
from pisa_fl.system.text import visible

SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\`{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
    "[": "{[}",  # where a line begins, these two would belong to the end of the line before
    "*": "{*}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
"""What LaTeX takes for something else, and how it is written."""

MATHEMATICS = dict(
    re.findall(
        r"(\S) (\S+)",
        "± pm × times ≤ leq ≥ geq ∞ infty → to · cdot µ mu"
        " α alpha β beta γ gamma δ delta ε varepsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi"
        " ρ rho σ sigma τ tau υ upsilon φ varphi χ chi ψ psi ω omega"
        " Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega",
    )
)
"""Signs and letters, and the commands for them in formulas."""

LETTERS = dict(
    re.findall(r"(\S) (\S+)", "ß ss æ ae Æ AE œ oe Œ OE ø o Ø O ł l Ł L ı i – textendash — textemdash … dots")
)
"""The same in text."""

ACCENTS = {
    **dict(zip("\u0300\u0301\u0302\u0303\u0304\u0307\u0308", "`'^~=.\"", strict=True)),
    **dict(zip("\u0306\u030a\u030b\u030c\u0327\u0323", "urHvcd", strict=True)),
}
"""Unicode's combining accents, and the commands for them."""


def latex(table: Table) -> str:
    """For a document that has the package booktabs; what is best is bold."""

    def line(cells: Sequence[str]) -> str:
        return "    " + " & ".join(cells) + r" \\"

    body = [
        line([rf"\textbf{{{escaped(c.text)}}}" if c.best else escaped(c.text) for c in cells])
        for cells in table.body
    ]
    columns = "l" * table.names + "r" * (len(table.header) - table.names)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escaped(table.caption)}}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            line([escaped(name) for name in table.header]),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escaped(text: str) -> str:
    """Text as LaTeX prints it; of what its usual fonts lack, the number in Unicode."""
    written = "".join(map(_character, visible(unicodedata.normalize("NFC", text))))
    return re.sub("-(?=-)", "-{}", written)  # two of them would be a dash


def _character(character: str) -> str:
    if character.isascii():
        return SPECIAL.get(character, character)
    if character in MATHEMATICS:
        return rf"$\{MATHEMATICS[character]}$"
    if character in LETTERS:
        return rf"\{LETTERS[character]}{{}}"
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in ACCENTS:
        return rf"\{ACCENTS[parts[1]]}{{{parts[0]}}}"
    return f"U+{ord(character):04X}"
