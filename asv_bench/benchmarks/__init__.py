"""The history of this library's speed, memory and accuracy, one file per operator.

Everything here is better when smaller: seconds, bytes, relative errors. asv calls a rise a regression and knows no other
direction. Each combination of parameters costs a process that imports torch, so a case has to earn its place.
"""
