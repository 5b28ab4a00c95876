"""How many examples the fuzzing tests try: DGPO_FUZZ, by default few. The same ones every time."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "dgpo",
    max_examples=int(os.environ.get("DGPO_FUZZ", "25")),
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
