"""The command line: `pisa-fl [overrides]`, a Hydra application; `pisa-fl --version`.

Exit status: 0 done, 1 the run failed, 2 the configuration is wrong (one sentence, no traceback), 130 interrupted.
A run of a sweep that fails says which it is; the others go on, and the sweep ends with its status.
`HYDRA_FULL_ERROR=1` shows the traceback all the same.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from pisa_fl.config import CONF, ConfigurationError, explain_composition, import_from, settle
from pisa_fl.config.explain import explain
from pisa_fl.results import claim
from pisa_fl.sweeps import plugins
from pisa_fl.sweeps.failure import FAILED, INTERRUPTED, WRONG, SweepError
from pisa_fl.system.text import tolerate_any_text, visible

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM)
"""Errors of the system, for which the configuration is not to blame."""


class _Mistake(Exception):
    """A run ended by an exception that only its programmer can mend, the argument: it is to be shown."""


def main() -> None:
    """Entry point of `pisa-fl`."""
    tolerate_any_text()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # Hydra prints and exits 1 on its own unless told to let exceptions through
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = sys.argv[1:]
    if arguments == ["--version"]:  # of which Hydra would tell its own
        print(f"pisa-fl {version('pisa-fl')}")
        return
    folder = _config_dir(arguments)
    try:
        if folder is not None:
            if not Path(folder).is_dir() or not folder:
                raise ConfigurationError(f"--config-dir={folder} is not a folder, or not found")
            import_from(folder)
        plugins.register()
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(_task)()
    except (SystemExit, SweepError) as end:
        if wants_traceback and end.__cause__ is not None:
            raise end.__cause__ from None
        if isinstance(end, SweepError) and end.sentence:
            _say(end.sentence)
        if end.args and end.args[0] == WRONG:
            claim.withdraw_sweeps()
        sys.exit(end.args[0] if end.args else 0)
    except _Mistake as mistake:
        raise mistake.args[0] from mistake.args[0].__cause__
    except Exception as error:  # before a run began: Hydra could not compose its configuration
        if wants_traceback:
            raise
        _say(explain_composition(error, [a for a in arguments if not a.startswith("-")], folder))
        claim.withdraw_sweeps()
        sys.exit(WRONG)
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(INTERRUPTED)


def _task(config: DictConfig) -> float | None:
    """One run, of a single command or of a sweep; what it is worth, by which a sweeper chooses what to try next."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        settings = settle(config)
        if "resume" in _given():
            _refuse_others("resume", "allow", "rounds")
        return _run(settings, directory)
    except (ConfigurationError, OSError) as error:
        no_room = isinstance(error, OSError) and error.errno in NO_ROOM
        _give_up(FAILED if no_room else WRONG, error)
    except SweepError:
        raise
    except Exception as error:
        raise _Mistake(error) from error
    finally:
        claim.withdraw(directory)


def _run(settings: DictConfig, directory: Path) -> float | None:
    # heavy imports only now: --help, --cfg and a wrong key or value are answered at once
    from rich.console import Console
    from rich.logging import RichHandler

    from pisa_fl.federation import RunError
    from pisa_fl.results.console import console
    from pisa_fl.results.result import Interrupted
    from pisa_fl.runner import resume, run

    # beside a live display, in which they have their place; or apart from what a quiet run gives
    where = Console(stderr=True) if settings.progress == "quiet" else console
    handler = RichHandler(console=where, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s", force=True)
    try:
        if settings.resume is None:
            return run(settings, directory).worth
        rounds = settings.rounds if "rounds" in _given() else None
        return resume(Path(settings.resume), allow=settings.allow, rounds=rounds).worth
    except RunError as error:
        _give_up(FAILED, error)
    except (Interrupted, KeyboardInterrupt) as error:
        _give_up(INTERRUPTED, error)


def _config_dir(arguments: list[str]) -> str | None:
    """The folder of the user's own groups and modules, if one is given."""
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            return value if equals else "".join(arguments[position + 1 : position + 2])
    return None


def _given() -> dict[str, str]:
    """The overrides that were given, by their keys."""
    return {text.lstrip("+").partition("=")[0]: text for text in HydraConfig.get().overrides.task}


def _refuse_others(key: str, *more: str) -> None:
    """Refuse overrides beside one that would ignore them, and beside those that go with it."""
    if others := [text for name, text in _given().items() if name not in (key, *more)]:
        raise ConfigurationError(f"{key} uses the run's own configuration: leave out {' '.join(others)}")


def _give_up(status: int, error: BaseException) -> NoReturn:
    """End a run here, and say why; of a sweep its launcher does, whose other runs may go on."""
    text = explain(error) if str(error) else "interrupted"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from pisa_fl.federation import DivergedError, TooFewClientsError

        # clients refuse to send what is not finite
        raise SweepError(status, text, isinstance(error, DivergedError | TooFewClientsError)) from error
    _say(text)
    raise SystemExit(status) from error


def _say(text: str) -> None:
    print(f"pisa-fl: {visible(text)}", file=sys.stderr)
