"""What a user can put right."""


class InputError(ValueError, TypeError):
    """An argument, a setting or a file that does not fit: the message names it, what was found and what is allowed.

    A `ValueError` and a `TypeError`, since what does not fit may be the one or the other. Files and packages that are
    missing, and a distillation that diverges, raise what Python has for them.
    """
