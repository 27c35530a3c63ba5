"""Writes the page of a recipe's data: one HTML file with everything in it."""

from collections.abc import Sequence

from jinja2 import Environment, StrictUndefined

from halfbyte.trainer.data_report.check import DataReport
from halfbyte.trainer.training.opening import data_rows

_TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Data of {{ name }}</title>
<style>
:root { color-scheme: light dark; --line: #8884; --faint: #8882; --cut: #e5484d; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
ul { padding-left: 1.2rem; }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
figure { border: 1px solid var(--line); border-radius: 6px; margin: 0; overflow: hidden; break-inside: avoid; }
figure img { background: var(--faint); display: block; height: 190px; object-fit: contain; width: 100%; }
.references { border-top: 1px solid var(--line); display: flex; font-size: .75rem; overflow-wrap: anywhere; }
.references > div { flex: 1; min-width: 0; padding: .2rem; } .references img { height: 95px; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; padding: .5rem; }
.name { font-weight: 600; } .facts { opacity: .75; }
.cut { color: var(--cut); text-decoration: line-through; }
details summary { cursor: pointer; }
</style>
</head>
<body>
<h1>Data of {{ name }}</h1>
<table>
{% for label, text in rows %}<tr><th scope="row">{{ label }}</th><td>{{ text }}</td></tr>
{% endfor %}</table>
{% if report.notes %}<h2>Notes</h2>
<ul>{% for note in report.notes %}<li>{{ note }}</li>{% endfor %}</ul>
{% endif %}{% if report.equal or report.near %}<h2>Equal and similar images</h2>
<ul>
{% for group in report.equal %}<li>equal: {{ group | join(", ") }}</li>
{% endfor %}{% for one, other in report.near %}<li>similar: {{ one }}, {{ other }}</li>
{% endfor %}</ul>
{% endif %}<h2>Images as they are trained</h2>
{% if report.hidden %}<p>{{ report.hidden }} more are not shown.</p>
{% endif %}<div class="grid">
{% for one in report.shown %}<figure>
<img src="{{ one.picture }}" alt="{{ one.name }}" loading="lazy">
{% if one.references %}<div class="references">
{% for reference in one.references %}<div><img src="{{ reference.picture }}" alt="{{ reference.name }}" loading="lazy">
<span class="facts">reference {{ loop.index0 }}: {{ reference.name }}, {{ reference.size }}</span></div>
{% endfor %}</div>
{% endif %}<figcaption><span class="name">{{ one.name }}</span><br>
<span class="facts">{{ one.group }}: {{ one.size }}{% for note in one.notes %}, {{ note }}{% endfor %}</span>
{% for caption in one.captions[:1] %}<p>{{ caption.read }}<span class="cut">{{ caption.cut }}</span></p>
{% endfor %}{% if one.captions | length > 1 %}<details><summary>{{ one.captions | length - 1 }} more texts</summary>
<ul>
{% for caption in one.captions[1:] %}<li>{{ caption.read }}<span class="cut">{{ caption.cut }}</span></li>
{% endfor %}</ul>
</details>{% endif %}</figcaption>
</figure>
{% endfor %}</div>
</body>
</html>
"""


_PROBLEMS = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Problems in the data of {{ name }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1400px; padding: 1rem; }
li { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ problems | length }} problems in the data of {{ name }}</h1>
<ul>
{% for problem in problems %}<li>{{ problem }}</li>
{% endfor %}</ul>
</body>
</html>
"""


def problems_page(problems: Sequence[str], name: str) -> str:
    """Returns a page that lists what is wrong with the data; `name` is the recipe's. Every text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_PROBLEMS).render(problems=problems, name=name)


def data_page(report: DataReport, name: str) -> str:
    """Returns the page as HTML; `name` is the recipe's. Every text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(report=report, name=name, rows=_rows(report))


def report_lines(report: DataReport) -> Sequence[tuple[str, str]]:
    """Returns a label and a text for each part of the report in a terminal."""
    equal = [("equal", ", ".join(group)) for group in report.equal]
    similar = [("similar", f"{one}, {other}") for one, other in report.near]
    return [*_rows(report), *equal, *similar, *(("note", note) for note in report.notes)]


def _rows(report: DataReport) -> list[tuple[str, str]]:
    return [
        *data_rows(report.summaries),
        ("validation", f"{report.held_out} images held out"),
        ("captions", f"{report.texts} different texts, {report.cut} longer than T5 reads"),
        ("copies", f"{len(report.equal)} groups of equal images, {len(report.near)} pairs of similar images"),
    ]
