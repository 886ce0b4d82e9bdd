"The pages in a real browser, without a network: nothing from outside, nothing on the console, nothing too wide"

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from site_fixture import HOSTILE, make_project

from recsys_lab.reporting.site import build_site

WIDE = """[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.rl-scroll, pre, math, svg')).map(e => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The made-up project's pages, library notebooks not run"
    top = make_project(tmp_path_factory.mktemp("project"))
    return build_site(top).parent


@pytest.fixture
def visit(browser):
    "Open a page offline; returns it and everything it said or asked for"
    opened = []

    def visit(path, width=1280):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        opened.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda e: said.append(f"error: {e}"))
        page.on("dialog", lambda d: said.append(f"dialog: {d.message}"))
        page.on(
            "request",
            lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None,
        )
        page.on("requestfailed", lambda r: said.append(f"failed: {r.url[:200]}"))
        page.goto(Path(path).as_uri(), timeout=90_000)
        page.wait_for_selector("body[data-ready]", timeout=60_000)
        return page, said

    yield visit
    for context in opened:
        context.close()


PAGES = "index.html summary.html studies.html lib/index.html lib/ease.html evaluate/ml100k-time-ease.html".split()


@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("name", PAGES)
def test_page_is_quiet_and_fits(site, visit, name, width):
    page, said = visit(site / name, width)
    page.wait_for_timeout(150)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), page.evaluate(WIDE)
    assert page.evaluate(WIDE) == []
    drawn = page.evaluate(
        "[...document.querySelectorAll('[data-plotly]')].map(f => !!f.querySelector('.main-svg'))"
    )
    assert all(drawn) and (drawn or name not in ("index.html", "evaluate/ml100k-time-ease.html"))


@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible(site, visit, name):
    page, _ = visit(site / name)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.title").strip()
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
    assert page.evaluate("[...document.images].every(i => i.alt)")
    unlabelled = "[...document.querySelectorAll('[role=img], [role=region], nav')].filter(e => !e.getAttribute('aria-label')).length"
    assert page.evaluate(unlabelled) == 0
    assert page.evaluate(
        "[...document.querySelectorAll('.rl-scroll')].every(e => e.tabIndex === 0)"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    ours = [
        i
        for i in ids
        if not re.match(r"clip|legend|g[0-9a-f]{6}|topdefs|defs|rangeslider|[0-9a-f]{6}", i)
    ]
    assert len(ours) == len(set(ours))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "rl-skip"


def test_the_decision_comes_first(site, visit):
    page, _ = visit(site / "index.html", 375)
    box = page.query_selector(".rl-call").bounding_box()
    assert box["y"] + box["height"] < 900
    text = page.inner_text("main")
    for words in (
        "0.331 [0.319, 0.343]",
        "What this does not show",
        "User 196",
        "missed",
        "not measured",
    ):
        assert words in text, words
    assert "a21d0bd" in page.inner_text("main") and "Versions" in page.inner_text("footer")


def test_titles_are_text_everywhere(site, visit):
    page, said = visit(site / "index.html")
    assert page.inner_text(".rl-users").count(HOSTILE) == 10
    page, more = visit(site / "evaluate/ml100k-time-ease.html")
    assert HOSTILE in page.inner_text("figcaption")
    assert said == more == []


def test_a_click_sorts(site, visit):
    page, _ = visit(site / "index.html")
    column = "[...document.querySelector('table.rl-sort').tBodies[0].rows].map(r => r.cells[0].innerText)"
    assert page.evaluate(column)[0] == "ease"
    button = page.locator("table.rl-sort th button").first
    button.click()
    assert page.evaluate(column) == sorted(page.evaluate(column))
    button.click()
    assert page.evaluate(column) == sorted(page.evaluate(column), reverse=True)
    by_time = (
        page.locator("table.rl-sort").first.locator("th", has_text="fit (s)").locator("button")
    )
    by_time.click()
    by_time.click()
    assert page.evaluate(column)[0] == "popularity"


def test_a_reader_can_hover(site, visit):
    page, _ = visit(site / "index.html")
    plot = page.locator("[data-plotly] .rl-plot").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".points path").last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector(".hovertext", timeout=5_000)
    assert "ease" in page.text_content(".hoverlayer")


def test_study_page(site):
    text = (site / "evaluate/ml100k-time-ease.html").read_text()
    assert text.count("<math") == 2 and "<code>$x$</code>" in text
    assert "<details" in text and "scoped" not in text and "scattergl" not in text
    for fact in (
        "model = ease, seed = 0",
        "0123456789abcdef",
        "a21d0bd",
        "AMD EPYC",
        "12.3 s",
        "2026-11-21",
    ):
        assert fact in text, fact
    assert "secret" not in (site / "lib/ease.html").read_text()


def test_one_plotly_for_the_site(site):
    assert [p.name for p in site.rglob("*.js")] == ["plotly.min.js"]
    for file in site.rglob("*.html"):
        assert file.stat().st_size < 300_000, file
        assert not re.search(
            r"""(src|href)=["'](https?:)?//|@import|url\(\s*["']?(https?:)?//""", file.read_text()
        ), file


def test_the_mailed_page_needs_nothing(site, visit, tmp_path):
    alone = shutil.copy(site / "summary.html", tmp_path / "mail.html")
    assert Path(alone).stat().st_size < 6_000_000
    page, said = visit(alone)
    assert said == []
    assert (
        page.evaluate("document.scripts.length") == 1
        and page.evaluate("document.querySelectorAll('[src]').length") == 0
    )
    assert page.evaluate("document.querySelectorAll('figure svg').length") >= 4


def test_a_page_alone_says_what_it_lacks(site, visit, tmp_path):
    alone = shutil.copy(site / "index.html", tmp_path / "index.html")
    page, _ = visit(alone)
    assert "needs the file plotly.min.js" in page.inner_text("[data-plotly]")


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.ids = [], set()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        for key in ("href", "src"):
            if key in attrs and not re.match(r"data:|https?:|mailto:", attrs[key]):
                self.found.append(attrs[key])


def test_no_broken_links(site):
    pages = {}
    for file in site.rglob("*.html"):
        pages[file.resolve()] = links = Links()
        links.feed(file.read_text())
    assert len(pages) >= 8
    for file, links in pages.items():
        for link in links.found:
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), f"{file.name} links to {link}"
            assert not anchor or anchor in pages[target].ids, f"{file.name} links to {link}"


def test_prints(site, visit, tmp_path):
    page, _ = visit(site / "index.html")
    page.emulate_media(media="print")
    assert not page.is_visible(".rl-top") and page.is_visible(".rl-call")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000


def test_empty_project_is_a_page(tmp_path, visit):
    (tmp_path / "params.yaml").write_text("")
    page, said = visit(build_site(tmp_path))
    assert said == [] and "make repro" in page.inner_text("main")


def test_library_notebooks_run_once(tmp_path):
    top = make_project(tmp_path)
    (top / "pyproject.toml").write_text(
        '[project]\nname = "recsys_lab"\nversion = "0"\n[tool.nbdev]\nnbs_path = "nbs"\nlib_path = "recsys_lab"\n'
    )
    (top / "recsys_lab").mkdir()
    notebook = top / "nbs/40_models/12_ease.ipynb"
    notebook.write_text(notebook.read_text().replace("return x", "return x\\n\\nf(6) * 7"))
    broken = top / "nbs/00_core/00_files.ipynb"
    broken.write_text(broken.read_text().replace("return x", "return x\\n\\nf(1) / 0"))
    text = (build_site(top).parent / "lib/ease.html").read_text()
    assert "make library" in text and "42" not in text
    out = build_site(top, run=True).parent
    text = (out / "lib/ease.html").read_text()
    assert "42" in text and "make library" not in text
    text = (out / "lib/files.html").read_text()
    assert "This notebook failed" in text and "ZeroDivisionError" in text
    kept = top / "artifacts/_executed/lib/40_models/12_ease.ipynb"
    before = kept.stat().st_mtime_ns
    build_site(top, run=True)
    assert kept.stat().st_mtime_ns == before
