"""How many seconds a fault is borne, where the environment says so."""

import os

from .errors import UsageError


def patience(variable: str, default: float, least: float = 0.0) -> float:
    """The seconds that an environment variable says, or `default`. Raises UsageError unless it is `least` or more."""
    said = os.environ.get(variable, str(default))
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not least <= seconds < float("inf"):
        raise UsageError(f"{variable}={said}: it has to be a number of seconds, {least:g} or more")
    return seconds
