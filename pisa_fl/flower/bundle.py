"""The Flower app bundle: it names pisa-fl's app, which is installed on every host."""

BUNDLE = """\
[project]
name = "pisa-fl"
version = "{version}"
description = "The configuration's own modules; pisa-fl itself is installed on every host."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "pisa-fl"

[tool.flwr.app.components]
serverapp = "pisa_fl.flower.app:server"
clientapp = "pisa_fl.flower.app:client"

[tool.flwr.app.config]
hydra = ""
"""
"""Its `pyproject.toml`, for a version of pisa-fl."""
