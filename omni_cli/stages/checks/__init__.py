"""The checks that audit makes of raw data. No torch: they run in many short-lived workers, which must start fast."""
