"""Settings of the documentation site: ``make docs`` builds it into build/docs."""

import re
from functools import partial
from pathlib import Path

import typer.cli
import typer.main
from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import claa_ops
from claa_ops.cli import app as command_line

project = "claa_ops"
author = "the authors of claa_ops"
copyright = author
version = release = claa_ops.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_disable_syntax = ["myst_line_comment"]  # a line of prose may begin with a percent sign
PUBLIC = ["claa_ops", "claa_ops.methods", "claa_ops.prefill", "claa_ops.selection"]
COMMANDS = "reference/_commands.md"
exclude_patterns = [COMMANDS]

# What does not resolve is an error, but for names that are documented elsewhere: a build needs no
# network, so it knows no other project's pages.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|collections|dataclasses|typing|typing_extensions)(\..*)?"),
    # Annotations name what their module imports, or a type variable or alias of it.
    (r"py:class", r"Tensor|PreTrained\w+|Callable|Any|Self|Keep|Reduce|PoolMode|.*\b(M|Size)"),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

html_theme = "furo"
html_title = f"claa_ops {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False


def write_commands(app: Sphinx) -> None:
    """What the page of the command line includes, by typer's own tool from the help texts."""
    group = typer.main.get_command(command_line)
    context = typer.Context(group)
    commands = [group.get_command(context, name) for name in group.list_commands(context)]
    write = partial(typer.cli.get_docs_for_click, ctx=context, indent=1, call_prefix="claa-ops")
    page = "".join(write(obj=command) for command in commands)
    # Else the two dashes before an option would become one.
    page = re.sub(r"(?<![-`\w])(--[a-z][a-z-]*)(?![^`\n]*`:)", r"`\1`", page)
    (Path(app.srcdir) / COMMANDS).write_text(page)


def keep_shapes_first(
    app: Sphinx, what: str, name: str, item: object, options: object, lines: list[str]
) -> None:
    """The shape before the first colon of a property, which napoleon takes for its type."""
    types = [line for line in lines if line.startswith(":type:")]
    if what == "property" and types:
        lines[lines.index(types[0])] = ""
        lines[0] = f"{types[0].removeprefix(':type:').strip()}: {lines[0]}"


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: TextElement
) -> Element | None:
    """A public name that a docstring of another module gives without its module."""
    for module in PUBLIC:
        name = f"{module}.{node['reftarget']}"
        found = env.domains.python_domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], name, node, shown
        )
        if found is not None:
            return found
    return None


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", write_commands)
    app.connect("autodoc-process-docstring", keep_shapes_first)
    app.connect("missing-reference", find_elsewhere)
