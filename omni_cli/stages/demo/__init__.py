"""`omni demo`: the whole way on a CPU, without a network, and what each step is for."""

from omni_cli.stages.demo.driving import driving_demo
from omni_cli.stages.demo.request import PROFILE, DemoRequest
from omni_cli.stages.demo.seeing import seeing_demo

__all__ = ["PROFILE", "DemoRequest", "driving_demo", "seeing_demo"]
