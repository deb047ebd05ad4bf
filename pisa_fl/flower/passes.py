"""How many passes over its examples a client has made: its owner may have set a limit."""

from __future__ import annotations

import json
from pathlib import Path

from pisa_fl.config import ConfigurationError
from pisa_fl.system.files import write


class PassesMade:
    """The count of one client, by experiment, in a file beside what it remembers.

    Args:
        root: Folder of what clients remember.
        client: Client number.
    """

    def __init__(self, root: Path, client: int) -> None:
        self._path = root / f"passes-client-{client}.json"

    def read(self) -> dict[str, float]:
        """Passes so far, by experiment; none where there is no file.

        Raises:
            ConfigurationError: The file holds something else.
        """
        try:
            made = json.loads(self._path.read_bytes())
            if not all(type(one) in (int, float) and 0 <= one < float("inf") for one in made.values()):
                raise ValueError("not all of it are numbers of passes")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, AttributeError) as error:
            words = f"{self._path.name} cannot be read ({error}): its owner has to mend or remove it"
            raise ConfigurationError(words) from error
        return made

    def add(self, experiment: str, passes: float) -> None:
        """Count more.

        Raises:
            ConfigurationError: The file holds something else.
            OSError: It cannot be written.
        """
        if passes:
            made = self.read()
            made[experiment] = made.get(experiment, 0.0) + passes
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write(self._path, json.dumps(made))
