"""What is left out where it cannot run."""

from __future__ import annotations

import os
import shutil

from tests.support.tools import ENGINES

collect_ignore = ["test_container.py"]
if os.environ.get("CI") == "true" and any(map(shutil.which, ENGINES)):
    collect_ignore.clear()
