"""`pisa-fl-report FOLDER...`: finished runs as a page, tables, figures, and a verdict in words.

command.py   the command, and what it writes
rows.py      runs of one setting become a row: a line of a panel
numbers.py   what was measured of runs and rows
paired.py    differences seed by seed, and the test whether luck explains them
verdict.py   sentences that follow from them
notes.py     what is missing, and which runs failed
tables.py    tables, in Markdown, LaTeX and HTML
sweep.py     what was swept, and its picture
charts.py    interactive charts
repeat.py    commands that repeat runs
page.py      one HTML page of all of it; its template/ has the page, its style and its script
"""

from pisa_fl.results.report.command import main, report

__all__ = ["main", "report"]
