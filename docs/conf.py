# SPDX-License-Identifier: MIT
"""The documentation site: `make docs` builds it from these pages, the docstrings and lpsgd.h."""

from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.nodes import get_node_source
from sphinx.writers.html5 import HTML5Translator

import lpsgd

project = "lpsgd"
release = version = lpsgd.__version__
html_title = f"lpsgd {version}"
html_theme = "furo"
html_theme_options = {"light_css_variables": {"code-font-size": "73%"}}  # 100 columns
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
myst_heading_anchors = 3  # links such as frameworks.md#timm
nb_execution_mode = "off"  # `make test-all` runs them, `make notebooks` keeps their output
nb_render_markdown_format = "myst"  # with tables
default_role = "code"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings tell types and ranges
napoleon_attr_annotations = False  # they do


def write_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Formulas as MathML, which browsers draw themselves: the site loads no script from afar."""
    block = isinstance(node, nodes.math_block)
    formula = str(tex2mathml(node.astext(), as_block=block))
    translator.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


PAGES = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing"}  # which include the file


def settle_links(app: Sphinx, document: nodes.document) -> None:
    """Links to files of the repository go to their pages; without one they become plain text."""
    for link in document.findall(pending_xref):
        if link["reftype"] != "myst" or link.get("refdomain") == "doc":
            continue
        file = Path(get_node_source(link) or "").parent / link["reftarget"]
        if file.name in PAGES:
            page = PAGES[file.name]
            link.attributes.update(refdomain="doc", reftarget=page, reftargetid=None)
        elif file.exists():
            link.replace_self(link[0])


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (write_formula, None), (write_formula, None))
    app.config.html_math_renderer = "mathml"
    app.connect("doctree-read", settle_links)
