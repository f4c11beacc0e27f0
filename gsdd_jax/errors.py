"""What a user can put right."""


class InputError(ValueError, TypeError):
    """An argument, a setting or a file that does not fit: the message names it, what was found and what is allowed.

    A `ValueError` and a `TypeError`, since what does not fit may be the one or the other. All other exceptions of this
    library are defects of it, or of what it calls.
    """
