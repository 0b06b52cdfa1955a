"""The page in a browser: it asks no network, and what one sees, filters, sorts and reaches is what the records say."""

import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import sample_records

from pipeline.report import page as index
from pipeline.report import rows, tradeoff

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHOSEN = {
    "champion": "restart-dealloc-0-int8",
    "reason": "highest validation accuracy (97.5 %) of the 3 of 12 that keep size_mb <= 0.06",
    "rule": {"best": "accuracy", "at_most": {"size_mb": 0.06, "latency_cpu_b1_idle_p50_ms": 1.0}, "at_least": {}},
    "values": {"size_mb": 0.059, "latency_cpu_b1_idle_p50_ms": 0.11},
    "candidates": 12,
}


def grid() -> rows.Report:
    """Two precisions, a pause before calls, and a variant that was never profiled."""
    records = sample_records.grid((0,), ("finetune", "restart"), precisions=("fp32", "int8"), idle=True)
    absent = ("profile", "restart-none-0", "int8")
    return rows.build([r for r in records if (r["stage"], r["variant"], r["precision"]) != absent], CHOSEN)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = next(filter(None, map(shutil.which, NAMES)), None) or driver.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip("there is no Chromium on this machine: neither a system's nor Playwright's own")
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("report") / "index.html"
    place.write_text(index.render(grid()))
    return place


@pytest.fixture
def open_page(browser: Any, path: Path) -> Iterator[Any]:
    """Opens the page with options of a browser context; in the end, nothing was asked for but the file, and nothing complained."""
    contexts, heard = [], []

    def opened(hash: str = "", **options: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        page.on("request", lambda request: heard.append(request.url))
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.goto(path.as_uri() + hash)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert {text.partition("#")[0] for text in heard if not text.startswith("data:")} == {path.as_uri()}


def point(page: Any, name: str, chart: int = 0) -> Any:
    return page.locator(".tradeoff.wide").nth(chart).locator(f'.point[aria-label^="{name}\\a"]')


def names(page: Any, selector: str) -> set[str]:
    """First lines of the labels of all points that are not filtered away."""
    found = page.evaluate("(s) => [...document.querySelectorAll(s)].map((e) => e.ariaLabel)", f"{selector}:not(.off)")
    return {text.split("\n")[0] for text in found}


def listed(page: Any) -> set[str]:
    """The names in the first column of the table, without lines that are filtered away."""
    script = "[...document.querySelectorAll('table.grid tbody tr')].filter((e) => e.checkVisibility())"
    return set(page.evaluate(script + ".map((e) => e.cells[0].dataset.value)"))


SCROLLED = """() => new Promise((done) => {
  document.querySelector(".tabs").scrollIntoView(); // a scroll hides the tip: it is over when the frame after it is
  requestAnimationFrame(() => requestAnimationFrame(() => requestAnimationFrame(done)));
})"""


def tip(page: Any) -> str | None:
    shown = page.evaluate("(() => { const t = document.getElementById('tip'); return [t.style.visibility, t.textContent]; })()")
    return shown[1] if shown[0] == "visible" else None


def test_the_page_asks_for_nothing_and_its_policy_lets_nothing_out(open_page: Any, path: Path, browser: Any) -> None:
    page = open_page()
    assert page.title().startswith("Winnow: 12 variants of cifar_quick on digits")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    asked: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        other = browser.new_page()  # its complaints are wanted
        other.goto(path.as_uri())
        assert other.evaluate(f"fetch('{address}/fetched', {{mode: 'no-cors'}}).then(() => 'loaded', () => 'refused')") == "refused"
        load = "new Promise((done) => { const one = document.createElement('%s'); one.onload = () => done('loaded');"
        load += " one.onerror = () => done('refused'); one.src = '%s'; document.head.append(one); })"
        for tag in ("img", "script"):
            assert other.evaluate(load % (tag, f"{address}/{tag}")) == "refused"
        other.evaluate(
            "(() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s); })()"
        )
        assert other.evaluate("window.ran === undefined") and asked == []
        other.close()
    finally:
        server.shutdown()
        server.server_close()


def test_a_point_tells_its_figures_to_pointer_and_keyboard(open_page: Any) -> None:
    page = open_page()
    expected = [
        "restart-diet-0-int8",
        f"accuracy: {100 * (0.9833 - 0.0139 - 0.0028):.2f} %",
        "change: -1.39 pt",
        "against fp32: -0.28 pt",
    ]
    expected += [f"MACs: {2_984_576 * 0.5**1.9 / 1e6:.3f} M", "speed-up CPU batch 1: 4.17×"]
    page.evaluate(SCROLLED)
    point(page, "restart-diet-0-int8").locator(".spot").hover()
    assert all(line in (tip(page) or "") for line in expected), tip(page)
    page.mouse.move(2, 2)
    assert tip(page) is None
    point(page, "restart-dealloc-0-int8").focus()
    assert (tip(page) or "").startswith("restart-dealloc-0-int8\nthe champion\naccuracy: 97.")
    page.keyboard.press("Escape")
    assert tip(page) is None


COMBINATIONS = [set(), {"int8"}, {"fp32", "none"}, {"restart"}, {"none", "diet"}, {"finetune", "dealloc", "fp32"}, {"fp32", "int8"}]


def test_filters_hide_points_and_rows_and_the_fronts_are_those_of_the_rest(open_page: Any) -> None:
    page, made = open_page(), grid()
    for off in COMBINATIONS:
        for box in page.query_selector_all(".filters input"):
            box.set_checked(box.get_attribute("value") not in off)
        left = [row for row in made.rows if not off & {row.revive, row.compress, row.precision}]
        assert listed(page) == {row.name for row in left}
        assert page.inner_text("output") == f"{len(left)} of 12 shown."
        for place, cost in enumerate(made.costs):
            known = [row for row in left if cost in row.values]
            front = rows.pareto([(row.values[cost], row.values["accuracy_onnx"]) for row in known])
            for layout in tradeoff.MARGINS:
                chart = f".tabs > figure:nth-of-type({place + 1}) .{layout}"
                assert names(page, f"{chart} .point") == {row.name for row in known}
                on = {row.name for row, is_on in zip(known, front, strict=True) if is_on}
                assert names(page, f"{chart} .point.front") == on
                corners = {tuple(p.get_attribute("data-at").split()) for p in page.query_selector_all(f"{chart} .point.front")}
                steps = page.get_attribute(f"{chart} .frontier", "d")
                assert len(re.findall("[MH]", steps)) == len(corners)
    page.click("text=Show all")
    assert len(listed(page)) == 12


def test_the_first_front_is_drawn_as_the_script_draws_it(open_page: Any, path: Path) -> None:
    drawn = re.findall(r'class="frontier" d="([^"]*)"', path.read_text())
    page = open_page()
    numbers = lambda d: [float(n) for n in re.findall(r"[\d.]+", d)]  # noqa: E731
    for before, after in zip(drawn, (e.get_attribute("d") for e in page.query_selector_all(".frontier")), strict=True):
        corners = _pairs(numbers(before))
        assert [corners[0], *corners[2::2]] == _pairs(numbers(after))  # every second one is the inner corner of a step


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values[::2], values[1::2], strict=True))


def test_every_column_sorts_both_ways_by_numbers_and_keeps_what_is_missing_last(open_page: Any) -> None:
    page, made = open_page(), grid()
    titles = [head.inner_text() for head in page.query_selector_all("table.grid thead th")]
    cells = (
        "(n) => [...document.querySelectorAll('table.grid tbody tr')].map((row) => [n, 0].map((i) => row.cells[i].dataset.value))"
    )
    for place in range(len(titles)):
        for direction in ("ascending", "descending"):
            page.click(f"table.grid thead th:nth-child({place + 1}) button")
            assert page.get_attribute(f"table.grid thead th:nth-child({place + 1})", "aria-sort") == direction
            found = [pair[0] for pair in page.evaluate(cells, place)]
            known = [text if place < 2 else float(text) for text in found if text is not None]
            assert known == sorted(known, reverse=direction == "descending") and len(found) == 12
            assert None not in found[: len(known)]
    assert len(page.query_selector_all("th[aria-sort]")) == 1
    place = titles.index("MACs")
    pairs = {name: float(value) for value, name in page.evaluate(cells, place) if value}
    assert pairs == {row.name: row.values["macs"] for row in made.rows if "macs" in row.values} and len(pairs) == 11


REACHED = "[...document.querySelectorAll('*')].indexOf(document.activeElement)"
WANTED = """() => {
  const every = [...document.querySelectorAll("*")], kinds = "a[href], button:enabled, summary, input, [tabindex='0']";
  const open = (e) => e.checkVisibility() && !(e.type === "radio" && !e.checked);
  return [...document.querySelectorAll(kinds)].filter(open).map((e) => every.indexOf(e));
}"""


def test_a_keyboard_reaches_and_works_everything(open_page: Any) -> None:
    page, reached = open_page(), set()
    wanted = set(page.evaluate(WANTED))
    for _ in range(len(wanted) + 5):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(REACHED))
    assert wanted <= reached and len(wanted) > 40
    page.focus(".filters input[value=int8]")
    page.keyboard.press("Space")
    assert "restart-diet-0-int8" not in listed(page)
    page.focus("table.grid thead th:nth-child(3) button")
    page.keyboard.press("Enter")
    assert page.get_attribute("table.grid thead th:nth-child(3)", "aria-sort") == "ascending"
    page.focus("#variant0 > summary")
    page.keyboard.press("Enter")
    assert page.evaluate("document.getElementById('variant0').open")
    page.focus("#cost0")
    page.keyboard.press("ArrowRight")
    assert page.is_checked("#cost1") and page.is_visible(".tabs > figure:nth-of-type(2) .wide")


def test_arrows_go_through_all_points_of_a_chart_in_the_order_of_their_axis(open_page: Any) -> None:
    page, made = open_page(), grid()
    stop = page.locator(".tradeoff.wide").first.locator('.point[tabindex="0"]')
    assert stop.count() == 1
    stop.focus()
    label = "document.activeElement.ariaLabel.split('\\n')[0]"
    for keys, key in ((("Home", "ArrowRight"), "macs"), (("Home", "ArrowUp"), "accuracy_onnx")):
        values = {row.name: row.values.get(key) for row in made.rows if "macs" in row.values}
        page.keyboard.press(keys[0])
        seen = []
        for _ in range(30):  # down to the end of that axis first
            page.keyboard.press({"ArrowRight": "ArrowLeft", "ArrowUp": "ArrowDown"}[keys[1]])
        for _ in values:
            seen.append(page.evaluate(label))
            page.keyboard.press(keys[1])
        assert sorted(seen) == sorted(values) and [values[name] for name in seen] == sorted(values.values())
    assert (tip(page) or "").startswith(page.evaluate(label))


OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


def test_a_phone_scrolls_the_table_and_not_the_page(open_page: Any) -> None:
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True)
    assert page.evaluate(OVERFLOW) == 0
    assert page.is_visible(".tradeoff.narrow >> nth=0") and not page.is_visible(".tradeoff.wide >> nth=0")
    page.evaluate(SCROLLED)
    page.locator(".tradeoff.narrow").first.locator(".point .spot").first.tap()
    box = page.locator("#tip").bounding_box()
    assert tip(page) and 0 <= box["x"] and box["x"] + box["width"] <= 360
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate(OVERFLOW) == 0
    assert page.evaluate("(() => { const box = document.querySelector('.tall'); return box.scrollWidth > box.clientWidth; })()")
    page.evaluate("document.querySelector('.tall').scrollTo(300, 200)")
    head, name = (page.locator(f"table.grid {where}").first.bounding_box() for where in ("thead th:nth-child(4)", "tbody th"))
    box = page.locator(".tall").first.bounding_box()
    assert (
        abs(head["y"] + head["height"] - box["y"] - page.locator("thead tr").first.bounding_box()["height"]) < 2
    )  # the head stays
    assert abs(name["x"] - box["x"]) < 2  # and so do the names


TEXT = """() => {
  const told = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  const every = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && told(e));
  return every.filter((e) => !e.closest("#tip") && !e.matches(":disabled")).map((e) => {
    const style = getComputedStyle(e);
    let ground = "rgba(0, 0, 0, 0)";
    for (let one = e; one && ground === "rgba(0, 0, 0, 0)"; one = one.parentElement) {
      if (!(one instanceof SVGElement)) ground = getComputedStyle(one).backgroundColor;
    }
    return [e instanceof SVGElement ? style.fill : style.color, ground, e.textContent.trim().slice(0, 40)];
  });
}"""
MARKS = """() => [...document.querySelectorAll(".spot, .ring, .frontier, .point:not(.front) .star")].map((e) => {
  const style = getComputedStyle(e);
  return [e.matches(".star") ? style.fill : style.stroke, getComputedStyle(document.body).backgroundColor, e.getAttribute("class")];
})"""


def contrast(one: str, two: str) -> float:
    """Of two colours as CSS computes them (WCAG 2.2, relative luminance)."""

    def light(text: str) -> float:
        shares = [int(number) / 255 for number in re.findall(r"\d+", text)[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, bright = sorted((light(one), light(two)))
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_and_marks_stand_out_in_light_and_dark(open_page: Any, scheme: str) -> None:
    page = open_page("#variant1", color_scheme=scheme)
    found = page.evaluate(TEXT)
    grounds = {ground for _, ground, _ in found}
    assert len(found) > 300 and len(grounds) >= 4
    luminance = contrast(page.evaluate("getComputedStyle(document.body).backgroundColor"), "rgb(0, 0, 0)")
    assert (luminance < 1.5) == (scheme == "dark")
    assert [row for row in found if contrast(*row[:2]) < 4.5] == []
    assert [row for row in page.evaluate(MARKS) if contrast(*row[:2]) < 3] == []


def test_a_link_opens_the_story_with_speed_and_certificates(open_page: Any) -> None:
    page = open_page()
    assert not page.is_visible("#variant5 table >> nth=0")
    page.click("table.grid a:text-is('restart-diet-0')")
    assert page.is_visible("#variant4 table >> nth=0")
    page.click("table.grid a:text-is('restart-dealloc-0-int8')")
    story = page.inner_text("#variant5")
    assert "97.0 % of the multiply-adds are in int8; in fp32 stayed conv1" in story
    measured, predicted = 1 / (0.84 * 0.4), 2_984_576 / int(2_984_576 * 0.8**1.9)
    for setting in ("CPU batch 1", "CPU batch 32", "CPU batch 1, after a pause"):
        line = page.inner_text(f'#variant5 tr:has(> th:text-is("int8, {setting}"))').split("\t")
        assert line[5].startswith(f"{measured:.2f}× [") and line[6:] == [f"{predicted:.2f}×", f"{100 * measured / predicted:.0f} %"]
    assert "pauses of 20 ms" in story and "Sample CPU" in story
    head = page.inner_text(".chosen")
    assert "Champion" in head and CHOSEN["reason"][1:] in head and "latency CPU batch 1, after a pause (ms): 0.11 ≤ 1" in head


def test_without_a_script_everything_can_still_be_read(open_page: Any) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".filters input:visible").count() == 0 and page.locator(".filters label:visible").count() == 7
    assert page.locator(".tradeoff.wide .point:visible").count() == 11 and page.locator("table.grid tbody tr").count() == 12
    page.click("label[for=cost1]")
    assert page.is_visible(".tabs > figure:nth-of-type(2) .wide") and not page.is_visible(".tabs > figure:nth-of-type(1) .wide")
    titles = page.locator(".tabs > figure:nth-of-type(2) .wide .point > title").all_text_contents()
    assert any(text.startswith("restart-dealloc-0-int8\nthe champion\naccuracy: ") for text in titles)
