"""The event-driven engine: spiking networks of integers on ordinary CPUs, faster the fewer neurons fire.

A layer over spikes adds up the weights of the inputs that fired, and nothing else; a spike map is one bit per neuron.
`to_program` makes a program of a network by `to_integers`, `Engine` runs it, `to_bytes` and `from_bytes` store it.
"""

from .bits import Bits, Comparison, EventLayer, Window, max_pool, threshold
from .engine import FORMAT, VERSION, Engine, from_bytes, to_bytes
from .library import available, choose, current, using
from .program import Program, to_program

__all__ = [
    "FORMAT",
    "VERSION",
    "Bits",
    "Comparison",
    "Engine",
    "EventLayer",
    "Program",
    "Window",
    "available",
    "choose",
    "current",
    "from_bytes",
    "max_pool",
    "threshold",
    "to_bytes",
    "to_program",
    "using",
]
