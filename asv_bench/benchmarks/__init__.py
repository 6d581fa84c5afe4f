"""The history of this library's speed, memory and accuracy: one file per family of operators, one for layers, one for compiling.

Everything here is better when smaller: seconds, bytes, relative errors, graphs. asv calls every rise a
regression. These files run against old commits too: ``setup`` looks newer functions up, and a missing one is "n/a".
"""
