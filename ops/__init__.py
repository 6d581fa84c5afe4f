"""The operators of FusedOneMoE, imported as ``fusedonemoe.ops``.

``library`` registers them with :mod:`torch.library` under the namespace ``fusedonemoe``; importing this package is what
makes ``torch.ops.fusedonemoe.*`` exist. People call :mod:`fusedonemoe.functional`, which validates and then calls these.
"""

if __name__ != "fusedonemoe.ops":
    raise ImportError(
        f"the folder ops/ is the package 'fusedonemoe.ops', not {__name__!r}: import it as `import fusedonemoe.ops` "
        "(two import names would register every operator twice)"
    )

from fusedonemoe.ops import library
from fusedonemoe.ops.choice import IMPLEMENTATIONS, Choice, Work, choose, count_work
from fusedonemoe.ops.plan import Plan

__all__ = ["IMPLEMENTATIONS", "Choice", "Plan", "Work", "choose", "count_work", "library"]
