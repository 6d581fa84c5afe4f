"""The command line: its commands, and the parts that several of them share."""

# The module of each command.
MODULES = {
    "demo": "fusedonemoe.cli.demo",
    "doctor": "fusedonemoe.cli.doctor",
    "bench": "fusedonemoe.bench",
    "report": "fusedonemoe.report",
}
