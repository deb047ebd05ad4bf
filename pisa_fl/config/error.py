"""The error of a configuration."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """Something that the user can mend; its text is one sentence that names the key and the remedy."""
