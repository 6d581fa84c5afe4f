"""Panels: float weights in the order in which the CPU kernels read them, as :mod:`fusedonemoe.ops.cpu.packing` makes them."""

from fusedonemoe.ops.formats.format import Format, Part, Tensors


class Panels(Format):
    """One tensor ``[E, panels, units, columns, elements]``, which does not tell O and I: zeros fill the last panel."""

    name = "panels"
    parts = (Part("packed_{}"),)
    has_sizes = False

    def holds(self, tensors: Tensors) -> bool:
        """Return True: no other format has these parts."""
        return True


PANELS = Panels()
