"""Optax, imported when it is first used: a set is read and drawn without it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optax as optax
else:

    class _Optax:
        def __getattr__(self, name: str) -> Any:
            import optax

            return getattr(optax, name)

    optax = _Optax()
