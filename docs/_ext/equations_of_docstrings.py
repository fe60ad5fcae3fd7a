"""Docstrings are written for a terminal; this keeps their equations as they stand there.

An indented block of a docstring is an equation or a program. reStructuredText would flow its lines together as a
quotation, so it is marked as literal. A bar outside of backticks is that of a norm, and no substitution.
"""

import re

SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Example|Examples|Note):$")
BAR = re.compile(r"(``.*?``|`[^`]*`)|\|")


def literal_blocks(app, what, name, obj, options, lines):
    """Changes the lines of a docstring in place, before napoleon reads its sections."""
    found = []
    in_sections = in_literal = False
    for number, line in enumerate(lines):
        in_sections = in_sections or SECTION.match(line) is not None
        is_indented = line.startswith("    ")
        before = lines[number - 1] if number else ""
        if not in_sections and is_indented and not before.strip() and not in_literal and not _is_in_list(lines, number):
            if not _paragraph_before(lines, number).endswith("::"):
                found += ["::", ""]
            in_literal = True
        if line.strip() and not is_indented:
            in_literal = False
        found.append(line if in_literal else BAR.sub(lambda match: match[1] or r"\|", line))
    lines[:] = found


def _paragraph_before(lines, number):
    return next((line for line in reversed(lines[:number]) if line.strip()), "")


def _is_in_list(lines, number):
    """Whether the indented line goes on with a list item."""
    above = next((line for line in reversed(lines[:number]) if line.strip() and not line.startswith("  ")), "")
    return above.startswith(("- ", "* ", "1. "))


def setup(app):
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
