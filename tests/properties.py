"""How properties are tried: with more examples under `make soak`, and never failed for being slow
on a busy machine.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests.conftest import SOAK

property_test = settings(
    max_examples=3000 if SOAK else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
