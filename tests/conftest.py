"""Settings of every test. A shared machine may be slow for a moment, so examples have no deadline of their own."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("swarmlm", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("swarmlm")
