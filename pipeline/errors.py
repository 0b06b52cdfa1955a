"""What a user can get wrong."""


class InputError(ValueError):
    """A mistake in the user's input: says what is wrong, where, what was allowed and what to do.

    A stage prints its message alone, without a traceback, and exits with code 2; nothing has been overwritten by then.
    """
