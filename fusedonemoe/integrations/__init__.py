"""Where users already are: other libraries' models, checkpoints, adapters and process groups, over the public functions.

Nothing inside the library imports these modules, and importing this package imports none of them.
"""
