"""What a user can get wrong."""

from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in the user's input: says what is wrong, where, what was allowed and what to do.

    A stage prints its message alone, without a traceback, and exits with code 2; nothing has been overwritten by then.
    """


def allow(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `InputError` where `value`, given as `name`, is not one of `allowed`."""
    choices = list(allowed)
    if value not in choices:
        raise InputError(f"{name} = {value!r}: must be one of {', '.join(map(str, choices))}")


def allow_share(name: str, value: float) -> None:
    """Raise `InputError` where `value`, given as `name`, does not lie in [0, 1]."""
    if not 0 <= value <= 1:
        raise InputError(f"{name} = {value!r}: must lie in [0, 1]")
