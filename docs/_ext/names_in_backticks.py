"""A `name in backticks` in a docstring leads to the one object of that name, wherever it is documented.

Docstrings name things as their reader would type them: `PoissonSampling`, `DPSGD.noise`, `dp_rmt.models.init_params`.
Sphinx finds a name in the module of the docstring alone. Here a name is looked up among the ends of all documented
names, and links where exactly one object answers to it. What is no documented name is shown as code.
"""

from sphinx.util.nodes import make_refnode


def resolve(app, env, node, contnode):
    if node.get("refdomain") != "py":
        return None
    objects = env.get_domain("py").objects
    wanted = node["reftarget"].removesuffix("()")
    found = {name for name in objects if name == wanted or name.endswith(f".{wanted}")}
    # An object that a package exports is documented under the package's name; its home is named in docstrings, too.
    if not found and wanted.startswith("dp_rmt."):
        last = wanted.rpartition(".")[2]
        found = {name for name in objects if name.rpartition(".")[2] == last and _is_same(wanted, name)}
    if len(found) != 1:
        return None
    (name,) = found
    entry = objects[name]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def _is_same(one, other):
    return _object(one) is _object(other) is not None


def _object(dotted):
    from pkgutil import resolve_name

    try:
        return resolve_name(dotted)
    except (ImportError, AttributeError):
        return None


def setup(app):
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
