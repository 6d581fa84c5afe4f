"""The history of this library's speed, memory and accuracy: one file per family of operators, one for layers, one for compiling.

Everything here is better when smaller: seconds, bytes, relative errors, graphs. asv calls a rise a regression and knows no
other direction. These files run against old commits too: what a commit has not got is looked up in ``setup``, and is "n/a".
"""
