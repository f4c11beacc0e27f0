"""What a user can put right."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError, TypeError):
    """An argument, a setting or a file that does not fit: the message names it, what was found and what is allowed.

    A `ValueError` and a `TypeError`, since what does not fit may be the one or the other. Files and packages that are
    missing, and a distillation that diverges, raise what Python has for them.
    """


@contextmanager
def needing(what: str, *, extra: str) -> Iterator[None]:
    """Says where an import fails for what it is needed, and which extra of this package has it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what}: pip install gsdd_jax[{extra}]") from error
