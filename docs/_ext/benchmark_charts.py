"""The data and the charts of the benchmark's page: medians and quartiles of the committed runs, drawn by Vega-Lite.

The browser needs no network: Vega's JavaScript is written beside the pages. What the page does with the charts is
`_static/benchmark.js`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import altair
import vl_convert

from bench import figures, results
from bench.ours import NAME, PROBE
from bench.plots import STYLES

PAGE = "benchmark"
SECTIONS = {
    "curves": "one array",
    "models": "the tensors of a model",
    "tail": "the whole tail",
    "states": "states in fewer bytes",
    "hard": "hard inputs",
    "threads": "threads",
}
UNIT = "ns per parameter (lower is better)"


def runs():
    """Every committed run, by the name of its folder, the one that the README shows first."""
    folders = sorted(figures.RESULTS.glob(f"*/{results.FILE}"), key=lambda file: file.parent.name != figures.MAIN)
    return {file.parent.name: results.load(file.parent) for file in folders}


def rows(run):
    """One row for each contestant of each workload: times in ns a step, rounded to four digits."""
    return [
        {
            "title": cell.info["title"],
            "section": section,
            "label": cell.info["label"],
            "parameters": cell.info["parameters"],
            "contestant": name,
            "where": cell.arrays_in,
            "bytes": entry.info["bytes_per_parameter"],
            **{key: float(f"{value * 1e9:.4g}") for key, value in vars(entry.sample).items()},
            "faster": 1.0 if name == NAME else round(cell.times_faster(name).median, 3),
            "noisy": bool(entry.info.get("disturbed")) or entry.sample.is_noisy,
        }
        for section in SECTIONS
        for cell in run.section(section)
        for name, entry in cell.entries.items()
    ]


def colours():
    """Colour of every contestant; fastopt's is that of the text, which a dark page turns light."""
    return altair.Scale(
        domain=list(STYLES), range=["currentColor" if name == NAME else style[0] for name, style in STYLES.items()]
    )


def _chart():
    """What both charts share: the rows that the page's form asks for, and numbers per parameter."""
    chosen = "datum.title == title && indexof(peers, datum.contestant) >= 0"
    parameters = [altair.param(name="title", value="Adam"), altair.param(name="peers", value=list(STYLES))]
    chart = altair.Chart(altair.Data(name="rows")).transform_filter(chosen).add_params(*parameters)
    numbers = {f"{name}_per_parameter": f"datum.{name} / datum.parameters" for name in ("q1", "median", "q3")}
    return chart.transform_calculate(**numbers, gb_per_s="datum.bytes * datum.parameters / datum.median")


TOOLTIP = [
    altair.Tooltip("contestant:N"),
    altair.Tooltip("label:N", title="workload"),
    altair.Tooltip("where:N", title="arrays in"),
    altair.Tooltip("median_per_parameter:Q", format=".3~g", title="median, ns per parameter"),
    altair.Tooltip("q1_per_parameter:Q", format=".3~g", title="first quartile"),
    altair.Tooltip("q3_per_parameter:Q", format=".3~g", title="third quartile"),
    altair.Tooltip("gb_per_s:Q", format=".3~g", title="GB/s"),
    altair.Tooltip("faster:Q", format=".3~g", title="fastopt is times faster"),
]


def curve():
    """ns per parameter over the parameter count, with quartiles; a point shows its numbers when the mouse is near."""
    colour = altair.Color("contestant:N", scale=colours(), legend=None)
    x = altair.X("parameters:Q", scale=altair.Scale(type="log"), title="parameters", axis=altair.Axis(format="~s"))
    y = altair.Y("median_per_parameter:Q", scale=altair.Scale(type="log"), title=UNIT)
    base = _chart().transform_filter("datum.section == 'curves'").encode(x=x, color=colour)
    width = altair.condition(f"datum.contestant == '{NAME}'", altair.value(3), altair.value(1.5))
    dash = altair.condition(f"datum.contestant == '{PROBE}'", altair.value([6, 4]), altair.value([1, 0]))
    lines = base.mark_line().encode(y=y, strokeWidth=width, strokeDash=dash, detail="contestant:N")
    quartiles = base.mark_rule(opacity=0.5).encode(
        y=altair.Y("q1_per_parameter:Q", title=""), y2=altair.Y2("q3_per_parameter:Q")
    )
    points = base.mark_circle(size=55, opacity=1).encode(y=y, tooltip=TOOLTIP)
    return _finished(altair.layer(lines, quartiles, points), 380)


def bars():
    """The contestants of one workload, the fastest first, with quartiles."""
    y = altair.Y("contestant:N", sort=altair.EncodingSortField("median", op="min"), title=None)
    base = (
        _chart()
        .add_params(altair.param(name="section", value="curves"), altair.param(name="label", value="1e7"))
        .transform_filter("datum.section == section && datum.label == label")
        .encode(y=y)
    )
    colour = altair.Color("contestant:N", scale=colours(), legend=None)
    x = altair.X("median_per_parameter:Q", title=UNIT)
    medians = base.mark_bar(opacity=0.75).encode(x=x, color=colour, tooltip=TOOLTIP)
    quartiles = base.mark_rule(size=2, color="currentColor").encode(
        x=altair.X("q1_per_parameter:Q", title=""), x2=altair.X2("q3_per_parameter:Q")
    )
    return _finished(altair.layer(medians, quartiles), altair.Step(26))


def _finished(chart, height):
    """As a dict, as wide as the page, in the colours of the page's text."""
    text = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
    lines = {"gridColor": "#888888", "domainColor": "#888888", "tickColor": "#888888", "gridOpacity": 0.2}
    fit = altair.AutoSizeParams(type="fit-x", contains="padding")
    return (
        chart.properties(width="container", height=height, background="transparent", autosize=fit)
        .configure_axis(**text, **lines, labelFontSize=12, titleFontSize=12)
        .configure_view(stroke=None)
        .to_dict()
    )


def script():
    """benchmark_data.js: specifications of the charts and the rows of every run."""
    described = {}
    for name, run in runs().items():
        machine = run.machine
        words = f"{machine['cpus']} processors ({machine['processor']}), {machine['fastopt']['isa']}"
        described[name] = {"machine": words, "rows": rows(run)}
    data = {
        "curve": curve(),
        "bars": bars(),
        "sections": SECTIONS,
        "colours": {name: style[0] for name, style in STYLES.items()},
        "ours": NAME,
        "runs": described,
    }
    return f"window.fastoptBenchmark = {json.dumps(data, separators=(',', ':'))};\n"


def vega():
    """Vega, Vega-Lite and Vega-Embed, as one script that leaves the page's other names alone."""
    version = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return f"(function () {{\n{vl_convert.javascript_bundle(vl_version=version)}\n}})();\n"


def write_scripts(app):
    report = (figures.RESULTS / figures.MAIN / "report.md").read_text(encoding="utf-8")
    (Path(app.srcdir) / "benchmark_report.md").write_text(re.sub(r"^!\[.*\n", "", report, flags=re.MULTILINE), "utf-8")
    folder = Path(app.doctreedir, "scripts")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vega.js").write_text(vega(), encoding="utf-8")
    (folder / "benchmark_data.js").write_text(script(), encoding="utf-8")
    app.config.html_static_path.append(str(folder))


def add_scripts(app, page, *_):
    if page == PAGE:
        for name in ("vega.js", "benchmark_data.js", "benchmark.js"):
            app.add_js_file(name, loading_method="defer")


def setup(app):
    app.connect("builder-inited", write_scripts)
    app.connect("html-page-context", add_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
