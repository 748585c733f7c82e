"""`python -m tests.daemon.another_machine serve ...`: the real command line on a computer of other sensors.

Their files lie below the folder that the environment variable MACHINE_ROOT names; `tests.machines` makes such folders.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

from edge_sdk import sensors

if __name__ == "__main__":
    from edge_sdk.cli import main

    sensors.Sensors = functools.partial(sensors.Sensors, Path(os.environ["MACHINE_ROOT"]))  # type: ignore[assignment, misc]
    main(prog_name="edge-sdk")
