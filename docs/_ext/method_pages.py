"""A page for each method: from its docstring, its row in the tables of methods and of bad values, and its paths."""

import inspect
import pathlib
import re

import toy
from script_pages import write_if_new

import mtlbalance as mtl
from mtlbalance.references import entries_of
from tests.catalogue import AGGREGATORS, SCALARIZERS

DOCS = pathlib.Path(__file__).parents[1]
FAMILIES = {"scalarization": "losses → one scalar", "aggregation": "one gradient per task → one gradient"}
COLUMNS = ["reads", "keeps", "total of the weights", "losses must be", "passes over micro-batches", "source"]
CASES = {f"scalarization.{case.name}": case for case in SCALARIZERS}
CASES |= {f"aggregation.{case.name}": case for case in AGGREGATORS}
MEASURED = ["evidence", "benchmarks"]  # pages whose tables have rows of methods
MENTIONING = ["start", "guides", "recipes", "coming_from", "faq.md", "numerics.md"]
RANKED = re.compile(r"^(\| (?:[ \d]\d |   ))(∇ )?(\w+)(?=:? )", re.MULTILINE)  # as compare.py writes a row
CALL = r"`(scalarization|aggregation|mtl)\.(\w+)\([^`]*\)`"


def cells(line):
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]


def rows():
    """Of each method, the rows of the table of methods: its own, and below it those that begin with "the same"."""
    found = {}
    for line in (DOCS / "methods" / "index.md").read_text().splitlines():
        if method := re.match(rf"\| {CALL} \|", line):
            last = found.setdefault(f"{method[1]}.{method[2]}", [])
            last.append(cells(line))
        elif line.startswith("| the same "):
            last.append(cells(line))
    return found


def bad_values(name):
    """What a bad value does to the method: ``[(which value, what happens), ...]``, from the tables of numerics."""
    family, _, method = name.partition(".")
    table = (DOCS / "numerics.md").read_text().partition(f"| `{family}` |")[2].partition("\n\n")[0].splitlines()
    for line in table[2:]:
        if line.startswith(f"| `{method}` |"):
            return [pair for pair in zip(cells(table[0]), cells(line)[1:], strict=False) if pair[1]]
    return []


def named(name):
    """The method's factory."""
    family, _, method = name.partition(".")
    return getattr(mtl if family == "mtl" else getattr(mtl, family), method)


def full(name):
    return f"mtlbalance.{name.removeprefix('mtl.')}"


def about(name):
    """The first line of the file that has the method, and the citation below it, if the file is the method's own."""
    line, _, citation = inspect.getmodule(named(name)).__doc__.strip().partition("\n")
    return line.strip(), inspect.cleandoc(citation)


def facts(name):
    """A table of what is known of the method, a column for each of its forms."""
    forms, case = rows()[name], CASES.get(name)
    lines = [["", *(form[0] for form in forms)], ["---"] * (1 + len(forms))]
    if name.partition(".")[0] in FAMILIES:
        lines.append(["makes", *[FAMILIES[name.partition(".")[0]]] * len(forms)])
    for i, column in enumerate(COLUMNS, start=1):
        values = [form[i] if i < len(form) else "" for form in forms]
        lines += [[column, *values]] if any(values) else []
    if case:
        known = {
            "draws at random": case.draws and "yes: `key`",
            "parameters split under `shard_map`": case.sharded and "`axis_name=`",
            "fewest tasks": case.fewest_tasks > 1 and str(case.fewest_tasks),
        }
        lines += [[key, *[value] * len(forms)] for key, value in known.items() if value]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def behaviour(name):
    found = bad_values(name)
    if not found:
        return ""
    lines = [("one bad value of three", "what happens"), ("---", "---"), *found]
    table = "\n".join(f"| {'any loss' if what == 'not read' else value} | {what} |" for value, what in lines)
    absent = "An absent task has weight 0, its entries of the state stay, and the others get what they would alone."
    words = "[What the words mean](../../numerics.md#zero-negative-nan-absent)."
    return f"## Zero, negative, NaN, absent\n\n{table}\n\n{absent} {words}"


def path_on_the_toy_problem(name):
    picture = toy.picture(name)
    if picture is None:
        return ""
    text = (
        "Five starts on [the toy problem](/examples/toy_pareto.md) of the CAGrad, Nash-MTL and FAMO papers, two of "
        "them above ravines (dotted), 50,000 steps of Adam; the darker, the smaller the losses. Dots are starts; stars "
        "ended on the front (yellow), crosses did not. The script has each setting; methods for positive losses see "
        "them plus a constant."
    )
    return f"## On a toy problem\n\n{text}\n\n![Paths of {name} from five starts](../toy/{picture.name})"


def is_of(line, name):
    """Whether a row is the method's: it stands there in code, or in a table of ``compare.py``."""
    family, _, method = name.partition(".")
    ranked = RANKED.match(line)
    if ranked and ranked[3] == method:
        return bool(ranked[2]) == (family == "aggregation")
    return re.search(rf"`(\w+\.)?{method}(\(.*?\))?`", line) is not None


def measured(name):
    """The rows of the tables of measurements whose cells name the method."""
    found = []
    for page in MEASURED:
        path = DOCS / f"{page}.md"
        for table in re.findall(r"(?:^\|.*\n)+", path.read_text() if path.exists() else "", re.MULTILINE):
            head, rule, *body = table.splitlines()
            own = [line for line in body if is_of(line, name)]
            found += ["\n".join([head, rule, *own]), f"From [{page}](../../{page}.md)."] if own else []
    return "## Measured\n\n" + "\n\n".join(found) if found else ""


def state_of(name):
    """The state's class, if the method's file has one."""
    module = inspect.getmodule(named(name)).__name__
    public = mtl if name.startswith("mtl.") else getattr(mtl, name.partition(".")[0])
    for attribute in public.__all__:
        found = getattr(public, attribute)
        if inspect.isclass(found) and found.__module__ == module:
            return full(f"{name.partition('.')[0]}.{attribute}")
    return None


def reference(name):
    lines = [f".. autofunction:: {full(name)}"]
    state = state_of(name)
    lines += ["", f".. autoclass:: {state}"] if state else []
    return "## Reference\n\n```{eval-rst}\n" + "\n".join(lines) + "\n```"


def mentions(name):
    """Pages that name the method in code."""
    family, _, method = name.partition(".")
    spoken = re.compile(rf"\b{family}\.{method}\b|`{method}(\(.*?\))?`")
    files = [path for place in MENTIONING for path in sorted((DOCS / place).rglob("*.md")) or [DOCS / place]]
    found = [path for path in files if path.exists() and spoken.search(path.read_text())]
    links = [f"[](../../{path.relative_to(DOCS)})" for path in found]
    return "## Named in\n\n" + ", ".join(links) + "." if links else ""


def bibtex(name):
    """As ``mtl.cite`` has it."""
    entries = "\n\n".join(entries_of(name.rpartition(".")[2]))
    return f"## Citation\n\n```bibtex\n{entries}\n```" if entries else ""


def page(name):
    line, citation = about(name)
    cited = f"```{{eval-rst}}\n{citation}\n```" if citation else ""
    parts = [f"# {name}", line, cited, facts(name), reference(name), behaviour(name)]
    parts += [path_on_the_toy_problem(name), measured(name), mentions(name), bibtex(name)]
    return "\n\n".join(part for part in parts if part) + "\n"


def file_of(name):
    return DOCS / "methods" / pathlib.Path(*name.split(".")).with_suffix(".md")


def write():
    for name in rows():
        write_if_new(file_of(name), page(name))


def with_links(docname, text):
    """In tables and lists of methods each name leads to its page."""
    if docname == "methods/index":
        return re.sub(rf"^\| ({CALL}) \|", r"| [\1](/methods/\2/\3.md) |", text, flags=re.MULTILINE)
    if docname == "numerics":
        parts = re.split(r"^(?=\| `(?:scalarization|aggregation)` \|)", text, flags=re.MULTILINE)
        return "".join(_link_rows(part) for part in parts)
    if docname == "evidence":
        return RANKED.sub(_link_ranked, text)
    if docname == "start/choose":
        return _link_names(text)
    return text


def _link_rows(part):
    """Of a table whose head names the family."""
    head, rule, *lines = part.split("\n")
    family = re.match(r"\| `(\w+)` \|", head)
    if not family:
        return part
    link = rf"| [\1](/methods/{family[1]}/\2.md) |"
    return "\n".join([head, rule, *(re.sub(r"^\| (`(\w+)`) \|", link, line) for line in lines)])


def _link_ranked(found):
    begin, mark, method = found[1], found[2] or "", found[3]
    names = ["aggregation." + method] if mark else ["scalarization." + method, "mtl." + method]
    known = [name for name in names if name in rows()]
    return f"{begin}{mark}[{method}](/methods/{known[0].replace('.', '/')}.md)" if known else found[0]


def _link_names(text):
    """Of code spans; names that are in both families, such as ``sum``, are the scalarizer."""
    known = rows()

    def link(span):
        found = [name for name in (f"scalarization.{span[2]}", f"aggregation.{span[2]}", span[2]) if name in known]
        return f"[{span[1]}](/methods/{found[0].replace('.', '/')}.md)" if found else span[0]

    return re.sub(r"(?<!\[)(`([\w.]+)(?:\([^`]*\))?`)(?!\])", link, text)
