"""Sphinx configuration. The build reaches no network: no intersphinx, no web fonts, no MathJax; formulas are code."""

import re
import sys
import textwrap
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import ClassVar

import torch
from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.domains.python import PyObject

import fusedonemoe.ops  # noqa: F401  # registers the operators whose schemas the `operator` directive prints

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "FusedOneMoE"
author = "The FusedOneMoE authors"
copyright = author
version = release = installed_version("fusedonemoe")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
    "history",
    "results",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_js_files = ["house.js"]
html_show_sourcelink = False
html_copy_source = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# API pages name every entry, so that a test can find public names without an entry.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a field of a dataclass is described once, in its class's docstring
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Source"]

nitpicky = True
nitpick_ignore_regex = [
    # Other projects' names; their inventories would need the network.
    (r"py:.*", r"(torch|numpy|np|nn|argparse|collections|os|pathlib|typing)(\..*)?"),
    (r"py:.*", r"(Tensor|Module|NDArray|ArrayLike|NamedTuple|Any|optional)"),
    # Modules and internals that docstrings mention; no page describes them.
    (r"py:.*", r"fusedonemoe\.(functional|ops|layers)"),
    # Sphinx cannot read a signature with a default factory in it, and takes the first word of its types for a name.
    (r"py:class", r"dict\[str"),
    # Type variables.
    (r"py:.*", r"fusedonemoe\.integrations\..*\.(AnyModule|Module)"),
]


for _field in PyObject.doc_field_types:
    if _field.name == "variable":
        _field.label = "Attributes"  # the heading in our docstrings


class Operator(Directive):
    """``{operator} name``: an operator's schema from the registry, with the text that describes it."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {}

    def run(self):
        """Return a definition: the qualified name, then the schema and the text."""
        name = self.arguments[0]
        schema = str(getattr(torch.ops.fusedonemoe, name).default._schema)
        # Break between arguments, never inside one: only a space after a comma or an arrow may become a line break.
        unbroken = re.sub(r"(?<![,>]) (?!->)", "\N{NO-BREAK SPACE}", schema)
        wrapped = "\n".join(textwrap.wrap(unbroken, width=78, subsequent_indent="    ")).replace("\N{NO-BREAK SPACE}", " ")
        block = nodes.literal_block(wrapped, wrapped, language="text")
        body = nodes.definition("")
        self.state.nested_parse(self.content, self.content_offset, body)
        body += block
        term = nodes.term("", "", nodes.literal(text=f"fusedonemoe::{name}"))
        return [nodes.definition_list("", nodes.definition_list_item("", term, body))]


def strip_code_blocks(app, doctree):
    """Drop the blank line that doctest needs between an expected output and the closing fence."""
    for block in doctree.findall(nodes.literal_block):
        text = block.astext().rstrip()
        block.rawsource, block.children = text, []
        block += nodes.Text(text)


def setup(app):
    """Register the directive and the clean-up."""
    app.add_directive("operator", Operator)
    app.connect("doctree-read", strip_code_blocks)
