"""Other systems' own names over the functions of this library, one module each: change the import line, keep the rest.

Each module follows the mathematics that the system documents. Where its code did something else, the module's docstring says
so, and the pages "Coming from ..." of the documentation list it. An argument of the wrong type or dtype raises a TypeError, a
shape or a device that does not fit a ValueError.
"""

from fusedonemoe.compat import candle, flashmoe, fusedonemoe, moekernel, momoe

__all__ = ["candle", "flashmoe", "fusedonemoe", "moekernel", "momoe"]
