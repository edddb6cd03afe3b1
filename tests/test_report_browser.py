"""The report as a reader sees it: a Chromium of the system opens the page, sorts, filters, clicks and prints it."""

from __future__ import annotations

import base64
import functools
import gzip
import http.server
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urljoin
from urllib.request import urlopen

import pytest
from helpers import run
from synthetic_report import HOSTILE, scored, vtab, write
from test_report import log

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra `test` has it)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="there is no Chromium on this machine (Debian: apt-get install chromium)"
    ),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
BOARD = "#vtab-1-leaderboard"
DIALOG = "#record-dialog"


@dataclass
class Reader:
    """A page in a browser, and what it did that a report must not do."""

    page: Any
    address: str
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def column(self, table: str, place: int) -> list[str]:
        """The first line of each cell of a column, as it is read."""
        cells = self.page.locator(f"{table} tbody tr > :nth-child({place})").all_inner_texts()
        return [text.strip().split("\n")[0].split(" · ")[0] for text in cells]

    def until(self, expression: str, arg: Any = None) -> None:
        """Wait until an expression of JavaScript holds.

        Not by `wait_for_function`, which in some versions evaluates in the page: its policy forbids that.
        """
        deadline = time.monotonic() + 120
        while not self.page.evaluate(expression, arg):
            assert time.monotonic() < deadline, expression
            self.page.wait_for_timeout(20)

    def sorted(self, head: Any, direction: str | None) -> None:
        """Wait until the `aria-sort` of a column is `direction`."""
        self.until(
            "([head, direction]) => head.getAttribute('aria-sort') === direction",
            arg=[head.element_handle(), direction],
        )

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window, once plots have settled (five seconds at most)."""
        wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        for _ in range(50):  # asked from here: the page's policy forbids a function of our own that waits in it
            if int(self.page.evaluate(wider)) <= 0:
                break
            self.page.wait_for_timeout(100)
        return int(self.page.evaluate(wider))

    def image(self, folder: Path, name: str) -> None:
        self.page.screenshot(path=folder / f"{name}.png")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with its report, and learning curves of a few runs."""
    folder = tmp_path_factory.mktemp("report") / "a_folder_whose_name_is_wider_than_the_window_of_any_phone"
    records = list(vtab(seeds=(0, 1)))
    write(folder / "results", records, broken=True)
    for record in records:
        if record.task == "vtab/dtd" and record.method in ("svp", "lora"):
            log(folder / "runs" / record.task / record.run_id, {"train/loss": [(n, 2 / (n + 1)) for n in range(30)]})
            log(folder / "runs" / record.task / record.run_id, {"train/top1": [(n, n / 30) for n in range(30)]})
    run("report", "--results_root", str(folder / "results"), "--runs_root", str(folder / "runs"))
    return folder / "results"


@pytest.fixture(scope="module")
def address(results: Path) -> Iterator[str]:
    """Serve the results folder on loopback."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=results)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/report/index.html"
        server.shutdown()


def open_page(browser: Any, url: str, **options: Any) -> Reader:
    """Open the page; refuse and record its further requests, and record its errors."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    reader = Reader(context.new_page(), url)

    def see(route: Any) -> None:
        if route.request.url == url:
            route.continue_()
        else:
            reader.requests.append(route.request.url)
            route.abort()

    def hear(dialog: Any) -> None:
        reader.errors.append(dialog.message)
        dialog.dismiss()

    context.route("**/*", see)
    reader.page.on("console", lambda message: reader.errors.append(f"{message.type}: {message.text}"))
    reader.page.on("pageerror", lambda error: reader.errors.append(str(error)))
    reader.page.on("dialog", hear)
    reader.page.goto(url)
    if options.get("java_script_enabled", True):
        reader.page.wait_for_selector("html[data-ready=yes]", state="attached")
    return reader


@pytest.fixture
def read(browser: Any, address: str) -> Iterator[Any]:
    """Open the page anew; at the end, it must have asked for nothing else and complained of nothing."""
    readers: list[Reader] = []

    def start(url: str = address, **options: Any) -> Reader:
        readers.append(open_page(browser, url, **options))
        return readers[-1]

    yield start
    for reader in readers:
        reader.page.context.close()
        assert (reader.errors, reader.requests) == ([], [])


@pytest.fixture(scope="module")
def desktop(browser: Any, address: str) -> Iterator[Reader]:
    reader = open_page(browser, address)
    yield reader
    reader.page.context.close()


@pytest.fixture
def reader(desktop: Reader) -> Iterator[Reader]:
    """The page in a window of a desktop, open already; each test leaves the tables as they were."""
    yield desktop
    desktop.page.keyboard.press("Escape")
    assert (desktop.errors, desktop.requests) == ([], [])


def test_it_opens_without_a_request_or_an_error(read: Any, tmp_path: Path) -> None:
    reader: Reader = read()
    reader.image(tmp_path, "desktop")
    reader.page.click("#open-all")
    assert reader.page.get_attribute("#open-all", "aria-pressed") == "true"
    assert reader.page.locator("main details:not([open])").count() == 0
    plots = reader.page.locator("[data-figure]")
    for place in range(0, plots.count(), 8):  # a plot appears when it is scrolled to
        plots.nth(place).scroll_into_view_if_needed()
        reader.until("place => document.querySelectorAll('[data-figure]')[place].querySelector('.main-svg')", arg=place)
    assert reader.overflow() <= 0
    reader.image(tmp_path, "desktop-open")


def test_the_network_is_out_of_reach(read: Any) -> None:
    reader: Reader = read()
    refused = reader.page.evaluate(
        """async () => {
          const refused = [];
          document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
          await fetch("/elsewhere").catch(() => {});
          document.body.append(Object.assign(new Image(), { src: "/elsewhere.png" }));
          document.body.append(Object.assign(document.createElement("script"), { textContent: "window.ran = true" }));
          await new Promise((done) => setTimeout(done, 200));
          return [refused.sort(), window.ran];
        }"""
    )
    assert refused == [["connect-src", "img-src", "script-src-elem"], None]
    policy = [text for text in reader.errors if "Content Security Policy" in text]
    assert len(policy) >= 3
    reader.errors.clear()


def test_columns_sort_and_missing_results_stay_last(reader: Reader) -> None:
    head = reader.page.locator(f"{BOARD} thead th", has_text="Structured")
    ranks = [str(n) for n in range(1, 10)] + ["–"]
    assert reader.column(BOARD, 1) == ranks
    place = reader.page.locator(f"{BOARD} thead th").all_inner_texts().index(head.inner_text()) + 1
    for reverse in (True, False):
        head.click()
        reader.sorted(head, "descending" if reverse else "ascending")
        *shown, missing = reader.column(BOARD, place)
        numbers = [float(text) for text in shown]
        assert missing == "–"
        assert numbers == sorted(numbers, reverse=reverse)
    head.click()
    reader.sorted(head, None)
    assert reader.column(BOARD, 1) == ranks, "the third click brings the ranking back"


def test_names_sort_as_names_by_keyboard(reader: Reader) -> None:
    button = reader.page.locator(f"{BOARD} thead th:nth-child(2) [role=button]")
    button.focus()
    reader.page.keyboard.press("Enter")
    reader.sorted(reader.page.locator(f"{BOARD} thead th:nth-child(2)"), "ascending")
    names = [re.sub(r"\s*incomplete", "", name) for name in reader.column(BOARD, 2)]
    assert names == sorted(names)
    assert names[0] == "adapter"
    for direction in ("descending", None):
        reader.page.keyboard.press("Enter")
        reader.sorted(reader.page.locator(f"{BOARD} thead th:nth-child(2)"), direction)


def test_rows_are_filtered(reader: Reader) -> None:
    box = reader.page.get_by_label("Filter the rows").first
    box.fill("vpt")
    assert reader.column(BOARD, 2) == ["vpt_deep", "vpt_shallow"]
    box.fill("nothing of this name")
    assert reader.page.locator(f"{BOARD} tbody").inner_text() == "No row fits the filter."
    box.fill("")
    assert reader.page.locator(f"{BOARD} tbody tr").count() == 10


def test_published_numbers_are_switched(reader: Reader, tmp_path: Path) -> None:
    quoted = reader.page.locator("#vtab-published")
    plot = reader.page.locator("[data-figure=vtab-1-mean-all-tasks]")
    plot.scroll_into_view_if_needed()
    assert not quoted.is_visible()
    assert "published" not in plot.inner_text()
    ranks = reader.column(BOARD, 1)
    reader.page.get_by_label("Published numbers").check()
    assert quoted.is_visible()
    assert "published, not measured here" in quoted.inner_text()
    reader.until(
        "() => document.querySelector('[data-figure=vtab-1-mean-all-tasks]').textContent.includes('not measured here')"
    )
    assert reader.column(BOARD, 1) == ranks
    plot.scroll_into_view_if_needed()
    reader.image(tmp_path, "published")
    reader.page.get_by_label("Published numbers").uncheck()
    assert not quoted.is_visible()
    reader.until(
        "() => !document.querySelector('[data-figure=vtab-1-mean-all-tasks]').textContent.includes('not measured here')"
    )


def test_a_number_opens_its_records(reader: Reader, results: Path, tmp_path: Path) -> None:
    dialog = reader.page.locator(DIALOG)
    number = reader.page.locator("#vtab-1-matrix tbody tr:first-child button").nth(2)
    number.click()
    assert dialog.is_visible()
    assert reader.page.locator("#record-dialog-title").inner_text() == "lora on dtd"
    seeds = dialog.locator("details.record")
    assert seeds.count() == 2
    seeds.first.locator("summary").click()
    dialog.get_by_text("Digest of the weights").first.wait_for()
    text = dialog.inner_text()
    for word in ("Digest of the weights", "sha256:" + "ab" * 32, "torch: 2.6.0", "NVIDIA H100", "top1: ", "Seed\n0"):
        assert word in text, word
    link = dialog.locator("a").first
    assert link.inner_text().startswith("records/vtab/dtd/lora-")
    target = urljoin(reader.address, link.get_attribute("href"))
    with urlopen(target, timeout=10) as answer:
        assert answer.read() == (results / link.inner_text()).read_bytes()
    reader.image(tmp_path, "dialog")
    reader.page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert number.evaluate("button => button === document.activeElement"), "the focus goes back to where it was"
    number.press("Enter")
    assert dialog.is_visible()
    dialog.get_by_role("button", name="Close", exact=True).click()
    assert not dialog.is_visible()


def test_a_seed_and_a_point_open_their_record(reader: Reader) -> None:
    reader.page.locator("#vtab-1 details.group summary").first.click()
    seed = reader.page.locator("#vtab-1 article.task").first.locator("td.links a").first
    label = seed.locator("xpath=ancestor::tr/th").inner_text().strip()
    seed.click()
    assert reader.page.locator("#record-dialog-title").inner_text() == f"{label} on cifar, seed 0"
    assert reader.page.url.split("#")[0] == reader.address, "the page is still there"
    reader.page.keyboard.press("Escape")
    plot = reader.page.locator("[data-figure=vtab-1-task-cifar]")
    plot.scroll_into_view_if_needed()
    box = plot.locator(".scatterlayer .trace").first.locator(".point").first.bounding_box()
    reader.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    plot.locator(".hoverlayer .hovertext").wait_for()
    assert "lora" in plot.locator(".hoverlayer").text_content()
    reader.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    reader.page.locator(DIALOG).wait_for()
    assert "lora on cifar" in reader.page.locator("#record-dialog-title").inner_text()


def test_all_records_are_listed_and_found(reader: Reader) -> None:
    table = reader.page.locator("#record-table")
    assert table.locator("tbody tr").count() == 25
    reader.page.locator("#records input").fill("failed")
    assert table.locator("tbody tr").count() == 1
    table.locator("tbody tr a").click()
    text = reader.page.locator(DIALOG).inner_text()
    assert "Status\nfailed" in text
    assert "loss is NaN <script>" in text, "hostile text is shown as it is"


def test_learning_curves_are_chosen(reader: Reader, tmp_path: Path) -> None:
    chosen = reader.page.locator("[data-curves=vtab]")
    assert chosen.get_by_label("Section").locator("option").count() == 2
    chosen.get_by_label("Task").select_option("vtab/dtd")
    chosen.get_by_label("Quantity").select_option(label="training accuracy")
    assert reader.page.locator("#vtab-curve-title").inner_text() == "training accuracy, vtab/dtd"
    reader.page.locator("#vtab-curves details summary").click()
    rows = reader.page.locator("#vtab-curve-table tbody tr")
    assert rows.count() == 6
    assert rows.first.inner_text().split("\t") == ["lora", "0", "29", "96.667"]
    chosen.get_by_label("Section").select_option(index=1)
    assert rows.count() == 4
    reader.page.locator("#vtab-curves").scroll_into_view_if_needed()
    reader.image(tmp_path, "curves")


def test_on_a_phone_nothing_is_wider_than_the_window(read: Any, tmp_path: Path) -> None:
    reader: Reader = read(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    reader.image(tmp_path, "phone")
    reader.page.locator("#open-all").tap()
    reader.page.get_by_label("Published numbers").check()
    reader.page.locator("#vtab-1-matrix").scroll_into_view_if_needed()
    assert reader.overflow() <= 0
    cell = reader.page.locator(f"{BOARD} tbody tr:first-child td:nth-child(3) button").bounding_box()
    assert cell["x"] + cell["width"] < 390, "the mean is seen without scrolling"
    box = reader.page.locator(".table-box", has=reader.page.locator("#vtab-1-matrix"))
    assert box.evaluate("box => box.scrollWidth > box.clientWidth"), "a wide table scrolls in its own box"
    reader.page.locator(f"{BOARD} tbody tr:first-child td:nth-child(3) button").tap()
    assert reader.page.locator(DIALOG).is_visible()
    assert reader.overflow() <= 0
    reader.image(tmp_path, "phone-dialog")


def test_on_paper(read: Any, tmp_path: Path) -> None:
    reader: Reader = read(color_scheme="dark")
    reader.page.emulate_media(media="print")
    reader.page.wait_for_selector("html.paper", state="attached")
    assert not reader.page.locator("nav.bar").is_visible()
    assert not reader.page.locator("#records").is_visible()
    assert reader.page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    widest = reader.page.evaluate("Math.max(...[...document.querySelectorAll('table')].map((t) => t.scrollWidth))")
    assert widest <= 186 / 25.4 * 96 + 1, "every table fits between the margins of A4"
    reader.image(tmp_path, "print")
    reader.page.emulate_media(media="screen")
    reader.page.wait_for_selector("html:not(.paper)", state="attached")
    reader.page.emulate_media(media="null")
    document = reader.page.pdf(path=tmp_path / "print.pdf", prefer_css_page_size=True)
    assert document.startswith(b"%PDF")


LUMINANCE = """([front, back]) => {
  const linear = (value) => (value /= 255) <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
  const [a, b] = [luminance(colour(front, "color")), luminance(colour(back, "backgroundColor"))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(read: Any, tmp_path: Path, scheme: str) -> None:
    reader: Reader = read(color_scheme=scheme)
    pairs = [("body", "body"), (".hint", "body"), (".lead", "body"), (f"{BOARD} .interval", "body"), ("nav a", "body"),
             (f"{BOARD} .number", "body"), (".note.warning", ".note.warning"), (".quoted .missing", ".quoted"),
             ("#open-all", "#open-all"), (".badge", "body"), (f"{BOARD} td.missing", "body")]  # fmt: skip
    ratios = {pair: reader.page.evaluate(LUMINANCE, list(pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}
    reader.page.locator("[data-figure]").first.scroll_into_view_if_needed()
    reader.page.locator("[data-figure] .ytick text").first.wait_for()
    text = reader.page.evaluate("getComputedStyle(document.querySelector('[data-figure] .ytick text')).fill")
    assert text == ("rgb(22, 25, 29)" if scheme == "light" else "rgb(233, 236, 239)"), "plots follow the theme"
    reader.page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    reader.until(
        "before => getComputedStyle(document.querySelector('[data-figure] .ytick text')).fill !== before", arg=text
    )
    reader.image(tmp_path, "other-theme")


def test_without_scripts_the_tables_can_be_read(read: Any) -> None:
    reader: Reader = read(java_script_enabled=False)
    assert "Scripts are off" in reader.page.locator("noscript").inner_text()
    assert reader.page.locator(f"{BOARD} tbody tr").count() == 10
    assert not reader.page.locator("#vtab-published").is_visible()
    link = reader.page.locator("#vtab-1 td.links a").first.get_attribute("href")
    assert link.startswith("../records/vtab/")
    assert reader.overflow() <= 0


def test_the_data_of_a_large_page_are_unpacked(
    read: Any, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svp_bench.report.page._LARGE", 1000)
    page = tmp_path / "large.html"
    run("report", "--results_root", str(results), "--output", str(page))
    packed = re.search(r'<script type="text/plain" id="data" data-encoding="gzip">(.*?)</script>', page.read_text())
    assert packed
    data = json.loads(gzip.decompress(base64.b64decode(packed.group(1))))
    reader: Reader = read(page.as_uri())
    assert (
        reader.page.locator("#record-table_info").inner_text().endswith(f" of {len(data['pool']['records'])} entries")
    )
    plot = reader.page.locator("[data-figure]").first
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for()
    assert not reader.page.locator("#too-old").is_visible()


def test_hostile_records_run_nothing(read: Any, tmp_path: Path) -> None:
    changes = {"model.method.init_args.share_layers": HOSTILE}
    fields = {"device": HOSTILE, "backbone": HOSTILE, "method_args": {HOSTILE: HOSTILE}, "scan_reason": HOSTILE}
    tasks = ("vtab/dtd", "vtab/svhn")
    records = [scored(task, "svp", 0, number=n, changes=changes, **fields) for n, task in enumerate(tasks)]
    records += [scored(task, "svp", 0, number=9 + n, **fields) for n, task in enumerate(tasks)]
    write(tmp_path / "results", records, broken=True)
    run("report", "--results_root", str(tmp_path / "results"), "--published")
    reader: Reader = read((tmp_path / "results" / "report" / "index.html").as_uri())  # from a file, not a server
    reader.page.click("#open-all")
    plot = reader.page.locator("[data-figure=vtab-1-task-dtd]")
    plot.scroll_into_view_if_needed()
    plot.locator(".main-svg").first.wait_for()
    assert "<script>alert" in reader.page.locator(f"{BOARD} tbody").inner_text()
    reader.page.locator("#vtab-1-matrix tbody button").first.click()
    reader.page.locator(f"{DIALOG} details.record").first.wait_for()
    assert "onerror" in reader.page.locator(DIALOG).inner_text()
    assert reader.page.locator("img").count() == 0
    assert reader.page.locator("script").count() == 4
    assert reader.overflow() <= 0
    reader.image(tmp_path, "hostile")
