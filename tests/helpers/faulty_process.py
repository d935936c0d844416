"""The real engine process, whose steps obey files in the directory LOGITSERVE_FAULTS.

hold     a step does not end while this file exists, and creates ``held`` in the meantime
allow    steps end in spite of ``hold``, and the first that has outputs removes this file
fault    the next step that has begun a request raises, once
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from logitengine.engine import Engine
from logitengine.link.messages import StepOutput
from logitengine.process import main

COMMAND = (sys.executable, __file__)

step = Engine.step


def faulty_step(engine: Engine) -> list[StepOutput]:
    faults = Path(os.environ["LOGITSERVE_FAULTS"])
    is_allowed = False
    while not is_allowed and (faults / "hold").exists():
        (faults / "held").touch()
        time.sleep(0.01)
        is_allowed = (faults / "allow").exists()
    outputs = step(engine)
    if is_allowed and outputs:
        (faults / "allow").unlink(missing_ok=True)
    if (faults / "fault").exists() and engine.begun_request_ids:
        (faults / "fault").unlink()
        raise RuntimeError("a fault for a test")
    return outputs


if __name__ == "__main__":
    setattr(Engine, "step", faulty_step)  # noqa: B010 - mypy forbids the plain assignment
    main()
