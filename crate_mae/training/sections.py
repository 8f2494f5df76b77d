"""Settings in sections, as config.json has them."""

from __future__ import annotations

from typing import Any


def by_name(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings by section.name; those in no section by their names."""
    named: dict[str, Any] = {}
    for name, value in settings.items():
        named |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return named
