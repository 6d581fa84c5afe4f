"""Directives and a role that put committed measurements on a page, so that none is typed by hand. See ``records``.

- ``{results} suite`` with ``:where:`` and a line for each column: a table.
- ``{pictures} suite`` with ``:draw:`` (latency, scaling, memory, usage or ratios) and ``:where:``: pictures.
- ``{measured} suite``: the date, the machine and the command; without a suite, a table of all.
- ``:empty:`` of a table or of ``{measured}``: the line in their place while the suite has no committed file.
- ``{result}`suite | quantity | form | where` ``: one figure in running text.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import records
from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective, SphinxRole

from fusedonemoe.report import pictures, tables
from fusedonemoe.report.runs import Run

DRAWN: dict[str, Callable[[pictures.Album, Run], list[str]]] = {
    "latency": pictures.latency,
    "scaling": pictures.scaling,
    "memory": pictures.memory,
    "usage": pictures.usage,
    "ratios": lambda _, run: [tables.heat_map(run)],
}


class _Shown(SphinxDirective):
    """A directive whose argument is a suite."""

    optional_arguments = 1

    def parsed(self, lines: list[str]) -> list[nodes.Node]:
        """Return the nodes of Markdown lines."""
        holder = nodes.Element()
        self.state.nested_parse(StringList(lines, self.get_source_info()[0]), self.content_offset, holder)
        return holder.children

    def suite(self) -> str:
        """Return the suite; Sphinx builds the page again when its file changes."""
        self.env.note_dependency(str(records.RESULTS / f"{self.arguments[0]}.json"))
        return self.arguments[0]

    def run(self) -> list[nodes.Node]:
        """Return the nodes; a missing field or record is an error of the build."""
        try:
            return self.show()
        except (records.NotThereError, ValueError) as reason:
            raise self.error(f"{self.name}: {reason}") from reason


class Results(_Shown):
    """A table."""

    has_content = True
    option_spec: ClassVar = {"where": directives.unchanged_required, "empty": directives.unchanged}

    def show(self):
        """Return the table."""
        where, empty = self.options.get("where", ""), self.options.get("empty", "")
        return self.parsed(records.table(self.suite(), where, "\n".join(self.content), empty))


class Measured(_Shown):
    """The date, the machine and the command of a measurement."""

    option_spec: ClassVar = {"empty": directives.unchanged}

    def show(self):
        """Return a sentence, or the table of every suite."""
        if self.arguments:
            suite = self.suite()
            if "empty" in self.options and suite not in records.suites():
                return self.parsed([self.options["empty"]])
            return self.parsed([f"{records.measured(suite)} The file: [{suite}.json](results/{suite}.json)."])
        alike: dict[tuple[str, str, str], list[str]] = {}
        for suite in records.suites():
            self.env.note_dependency(str(records.RESULTS / f"{suite}.json"))
            measured_on = (records.results_of(suite)["date"][:10], records.machine_of(suite), records.versions_of(suite))
            alike.setdefault(measured_on, []).append(f"[{suite}](results/{suite}.json)")
        lines = ["| files | measured | machine | versions |", "|---|---|---|---|"]
        lines += [f"| {', '.join(files)} | {' | '.join(facts)} |" for facts, files in alike.items()]
        return self.parsed(lines)


class Pictures(_Shown):
    """Pictures of the report, inside the page."""

    option_spec: ClassVar = {"where": directives.unchanged, "draw": lambda name: directives.choice(name, sorted(DRAWN))}

    def show(self):
        """Return the pictures, as HTML; other builders leave them out."""
        suite = self.suite()
        found = records.results_of(suite)
        wanted = {record["cell"] for record in records.chosen(records.records_of(suite), self.options.get("where", ""))}
        cells = tuple(cell for cell in found["cells"] if cell["name"] in wanted)
        settings = {key: value for key, value in found.items() if key != "cells"}
        # One numbering for a page: the ids of the pictures' titles must differ.
        album = self.env.temp_data.setdefault("album of results", pictures.Album())
        drawn = DRAWN[self.options["draw"]](album, Run(f"{suite}, {found['date'][:10]}", settings, cells))
        if not any(drawn):
            raise records.NotThereError(f"{suite}: nothing to draw")
        html = drawn[0] if self.options["draw"] == "ratios" else pictures.grid(drawn)
        return [nodes.raw("", f'<div class="measured">{html}</div>', format="html")]


class Result(SphinxRole):
    """One figure."""

    def run(self):
        """Return the figure as text."""
        self.env.note_dependency(str(records.RESULTS / f"{self.text.partition('|')[0].strip()}.json"))
        try:
            return [nodes.Text(records.figure(" ".join(self.text.split())))], []
        except (records.NotThereError, ValueError) as reason:
            message = self.inliner.reporter.error(f"result: {reason}", line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]


def setup(app: Any) -> dict[str, Any]:
    """Register the directives and the role."""
    app.add_directive("results", Results)
    app.add_directive("measured", Measured)
    app.add_directive("pictures", Pictures)
    app.add_role("result", Result())
    app.add_css_file("results.css")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
