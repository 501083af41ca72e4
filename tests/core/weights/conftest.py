"""How many damaged files are tried: some in every run, many with --hypothesis-profile=fuzz."""

from datetime import timedelta

from hypothesis import HealthCheck, settings

NO_CHECKS = (HealthCheck.too_slow, HealthCheck.data_too_large)

# The same files in every run; an example that takes seconds is as good as one that never ends.
settings.register_profile(
    "wanqwen", max_examples=150, derandomize=True, deadline=timedelta(seconds=20), suppress_health_check=NO_CHECKS
)
settings.register_profile(
    "fuzz", max_examples=5000, deadline=timedelta(seconds=20), suppress_health_check=NO_CHECKS, database=None
)
settings.load_profile("wanqwen")
