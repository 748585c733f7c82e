"""Where the data that ships with edge-sdk lies: device profiles and the bundled example.

In a wheel it is packed under `edge_sdk/_data`; in a source checkout it is the repository's own top-level folders.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent

PROFILES = _ROOT / "device_profiles"
EXAMPLES = _ROOT / "engines"
