"""The built site: links, pictures, search and formulas work without a network, and generated texts are the real ones.

`python -m sphinx -W -b html docs build/site && python -m pytest docs`; `--site` for another folder.
"""

import inspect
import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import benchmark_charts
import formulas
import kernel_texts
import numpy as np
import optimizer_pages
import pytest
import schedule_pictures

import fastopt
from fastopt import _codegen, lr_scheduler
from fastopt._formats import STATE_DTYPES
from fastopt._instruction_sets import INSTRUCTION_SETS
from fastopt.rules import docstrings, registry


class Page(HTMLParser):
    """Tags of one page with their attributes, anchors, and the text outside of scripts."""

    def __init__(self, path):
        super().__init__()
        self.tags = []
        self.anchors = set()
        self.text = ""
        self.silent = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
        self.silent += tag in ("script", "style")

    def handle_endtag(self, tag):
        self.silent -= tag in ("script", "style")

    def handle_data(self, data):
        self.text += data * (not self.silent)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="session")
def pages(site):
    """Every page by its path below the site."""
    paths = [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]
    return {path.relative_to(site).as_posix(): Page(path) for path in paths}


def references(page):
    """What a page links to and what it loads: (tag, address)."""
    for tag, attribute in (("a", "href"), ("link", "href"), ("script", "src"), ("img", "src"), ("source", "src")):
        for attributes in page.all(tag):
            if attributes.get(attribute):
                yield tag, attributes[attribute]
    for attributes in page.all("img"):
        for source in filter(None, (attributes.get("srcset") or "").split(",")):
            yield "img", source.split()[0]


def test_every_link_leads_to_a_page_and_an_anchor(site, pages):
    broken = []
    for name, page in pages.items():
        for _, address in references(page):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (site / name).parent / unquote(parts.path) if parts.path else site / name
            if not target.exists():
                broken.append((name, address))
            elif parts.fragment and target.suffix == ".html":
                anchors = pages[target.resolve().relative_to(site).as_posix()].anchors
                if unquote(parts.fragment) not in anchors:
                    broken.append((name, address))
    assert not broken


def test_nothing_is_loaded_from_the_network(site, pages):
    loaded = [
        (name, address)
        for name, page in pages.items()
        for tag, address in references(page)
        if tag != "a" and urlsplit(address).netloc
    ]
    loaded += [
        (path.name, found)
        for path in site.rglob("*.css")
        for found in re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^\"')]+", path.read_text(encoding="utf-8"))
    ]
    assert not loaded


def test_every_picture_has_a_text_alternative(pages):
    silent = [
        (name, image.get("src"))
        for name, page in pages.items()
        for image in page.all("img")
        if not (image.get("alt") or "").strip() or image["alt"] == image["src"]
    ]
    silent += [
        (name, attributes)
        for name, page in pages.items()
        for _, attributes in page.tags
        if attributes.get("role") == "img" and not (attributes.get("aria-label") or attributes.get("aria-hidden"))
    ]
    assert not silent


def test_every_page_has_one_title_a_language_and_fits_narrow_screens(pages):
    for name, page in pages.items():
        assert len(page.all("h1")) == 1, name
        assert page.all("html")[0]["lang"] == "en", name
        assert any("width=device-width" in (meta.get("content") or "") for meta in page.all("meta")), name


def test_no_tex_is_left_where_a_formula_should_be(pages):
    for name, page in pages.items():
        assert not re.search(r"\\(frac|sqrt|beta|gamma|begin)\b|:math:", page.text), name


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_every_optimizer_has_a_page_with_formula_bounds_pictures_and_relatives(pages, spec):
    page = pages[f"optimizers/{spec.function}.html"]
    assert any(attributes.get("display") == "block" for attributes in page.all("math"))
    for name, hyper in spec.hypers.items():
        assert name in page.text
        assert hyper.kind.described() in page.text
    pictures = [image["src"] for image in page.all("img")]
    assert any(f"{spec.function}-path.svg" in source for source in pictures)
    assert any(f"{spec.function}-speed.svg" in source for source in pictures)
    links = {link.get("href") for link in page.all("a")}
    for head, _ in docstrings.entries(docstrings.sections(spec.cls)["See Also"]):
        name = head.partition(" : ")[0]
        assert f"{name.lower()}.html#fastopt.{name}" in links


def test_every_public_name_is_documented(pages):
    anchors = set().union(*(page.anchors for page in pages.values()))
    for module in (fastopt, fastopt.functional, fastopt.reference, fastopt.lr_scheduler):
        for name, value in vars(module).items():
            is_ours = getattr(value, "__module__", "").startswith("fastopt")
            if not name.startswith("_") and is_ours and callable(value):
                assert f"{module.__name__}.{name}" in anchors


def test_the_search_finds_adamw(site):
    text = (site / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    documents = index["titleterms"]["adamw"]
    found = [index["docnames"][k] for k in (documents if isinstance(documents, list) else [documents])]
    assert "optimizers/adamw" in found


# --- What is made from the code


def test_the_paths_start_where_they_should_and_descend():
    for spec in registry.values():
        lr, points = optimizer_pages.best_path(spec.cls)
        heights = optimizer_pages.valley(points)
        assert tuple(points[0]) == pytest.approx(optimizer_pages.START)
        assert lr in optimizer_pages.RATES
        assert heights[-1] < heights[0] / 2, spec.name


def test_a_path_is_that_of_the_optimizer():
    points = optimizer_pages.path(fastopt.SGD, 0.5)
    np.testing.assert_allclose(points[1], [-7.2 * 0.95, 0], rtol=1e-6)


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_the_table_of_hyperparameters_has_every_one_with_its_default(pages, spec):
    row = next(row for row in optimizer_pages.defaults().split("* - ") if f"<{spec.function}>" in row)
    _, *parameters = inspect.signature(spec.cls).parameters.values()
    ours = [f"{p.name}={p.default!r}" for p in parameters if p.name in spec.hypers]
    assert re.findall(r"``(.+?)``", row) == ours
    assert ", ".join(ours) in " ".join(pages["optimizers/index.html"].text.split())


@pytest.mark.parametrize("spec", registry.values(), ids=lambda spec: spec.name)
def test_the_table_of_optimizers_has_the_bytes_that_a_state_takes(spec):
    row = next(row for row in optimizer_pages.overview().split("* - ") if f"<{spec.function}>" in row)
    p = np.ones(64_000, np.float32)
    kept = []
    for state_dtype in STATE_DTYPES:
        optimizer = spec.cls([p], state_dtype=state_dtype)
        optimizer.step([np.ones_like(p)])
        kept.append(f"{optimizer.state_nbytes / p.size:.3g}")
    assert f"- {', '.join(kept)}" in row


def test_the_table_of_optimizers_says_what_other_hyperparameters_add():
    assert "8, 4, 2.06; +4, 2, 1.03 with ``amsgrad=True``" in optimizer_pages.overview()


def test_every_schedule_is_drawn():
    drawn = {text.partition("(")[0] for text in schedule_pictures.SCHEDULES}
    schedules = {name for name, value in vars(lr_scheduler).items() if isinstance(value, type)}
    assert drawn == schedules - {"LRScheduler"}


def test_the_formula_of_a_docstring_becomes_mathematics():
    text = "m = beta1 * m + (1 - beta1) * g\np = p - lr * m / (1 - beta1**t) / (sqrt(v) + eps)"
    first, second = formulas.formula(text).split(" \\\\\n")
    assert first == r"m & \leftarrow \beta_{1}\, m + (1 - \beta_{1})\, g"
    assert second == (r"p & \leftarrow p - \frac{\mathrm{lr}\, m}{(1 - \beta_{1}^{t})\, (\sqrt{v} + \epsilon)}")


def test_a_fraction_inside_a_fraction_is_written_with_a_slash():
    nested = formulas.formula("p = (m / (1 - beta1**t)) / (v / (2 * t * g) + eps)")
    assert nested == r"p & \leftarrow \frac{m}{(1 - \beta_{1}^{t})\, (v / (2\, t\, g) + \epsilon)}"


def test_what_is_no_formula_is_refused():
    for text in ("for i in range(3): pass", "x = [1]", "not python"):
        with pytest.raises(ValueError, match=r"no formula has|invalid syntax"):
            formulas.formula(text)


def test_the_shown_cython_is_part_of_what_is_compiled():
    for name in ("adam", "lion", "rmsprop_centered"):
        spec = next(spec for spec in registry.values() if any(k.name == name for k in _codegen.kernels(spec)))
        source = _codegen.cython_source([spec], kernel_texts.TEMPLATE, "baseline")
        shown = kernel_texts.cython_text(name).split("\n\n")
        assert len(shown) == 2
        assert all(part.strip() in source for part in shown)


def test_the_shown_machine_code_is_a_loop_without_contraction(pages):
    isa, text = kernel_texts.assembly_text("adam")
    if isa is None:
        assert text in pages["inside/index.html"].text
        return
    assert isa in INSTRUCTION_SETS
    assert text.startswith("loop:\n")
    assert text.endswith("loop")
    assert "sqrtps" in text
    assert "fmadd" not in text
    assert "sqrtps" in pages["inside/index.html"].text


def test_without_objdump_the_page_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert kernel_texts.assembly_text("adam") == (None, "objdump is not installed")


def test_the_benchmark_shows_medians_and_quartiles_of_the_committed_runs(site):
    text = (site / "_static" / "benchmark_data.js").read_text(encoding="utf-8")
    data = json.loads(text[text.index("{") : text.rindex("}") + 1])
    for folder, run in benchmark_charts.runs().items():
        rows = data["runs"][folder]["rows"]
        cell = run.cell("curves/Adam/1e7")
        for name, entry in cell.entries.items():
            row = next(r for r in rows if (r["title"], r["label"], r["contestant"]) == ("Adam", "1e7", name))
            shown = [row[key] for key in ("q1", "median", "q3")]
            sample = entry.sample
            np.testing.assert_allclose(shown, np.array([sample.q1, sample.median, sample.q3]) * 1e9, rtol=1e-3)


def test_the_benchmark_page_is_small(site):
    assert (site / "_static" / "benchmark_data.js").stat().st_size < 1e6
    assert (site / "_static" / "vega.js").stat().st_size < 1.5e6
