"""What a model must beat: answers that need no picture."""

from omni_cli.scene.clock import Float64Array


def constant_velocity(column: str, start_speed_mps: Float64Array, duration_s: Float64Array) -> Float64Array:
    """Return what follows if the speed at the first instant never changed.

    Args:
        column: `mean_speed_mps` or `displacement_m`.
        start_speed_mps: (n,) forward speed at the window's first instant.
        duration_s: (n,) from the first to the last instant.

    Raises:
        KeyError: constant velocity says nothing about that column.
    """
    return {"mean_speed_mps": start_speed_mps, "displacement_m": start_speed_mps * duration_s}[column]
