"""The sides of a comparison, each in a process of its own: pisa-fl, plain PyTorch, and other frameworks.

`python -m experiments.benchmarks.sides NAME TASK [OPTION ...]` warms up, says so, and then does one round for each
line that it is sent, and answers with a line of JSON. So the sides can take turns, and only one works at a time.
"""
