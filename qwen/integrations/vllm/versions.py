"""The versions of vLLM that this plugin supports."""

import re

OLDEST = (0, 28)
"""The oldest one that has all interfaces that the plugin uses."""
NEWEST = (0, 33)
"""The newest one that the plugin is known to work with."""


def release_of(version: str) -> tuple[int, int] | None:
    """Return the major and minor number of a version, None for a build that has none of its own."""
    found = re.match(r"(\d+)\.(\d+)", version)
    release = (int(found[1]), int(found[2])) if found else None
    return None if release == (0, 1) else release  # 0.1.dev: built from a folder without tags
