"""The report in a real browser: pointing, clicking, filtering, typing, and nothing that runs."""

import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perplexit as px
from perplexit.runs.run import Run
from perplexit.runs.run_text import RunText
from tests.report_experiments import GAINS, document_of, experiment_folder
from tests.report_runs import shifted, toy_runs, with_kl

pytestmark = pytest.mark.browser
pytest.importorskip("selenium")
from selenium.webdriver import ActionChains  # noqa: E402 - an optional package
from selenium.webdriver.common.keys import Keys  # noqa: E402

WORDS = ["the", "loss", "of", "a", "token", "measures", "surprise", "when", "models", "meet", "it"]
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'><svg onload=\"window.hacked = 3\">",
    '"\'`><iframe srcdoc="<script>parent.hacked = 4</script>"></iframe><!-- <script> ]]> -->',
    "{{ 7 * 7 }} ${window.hacked = 5} \u2028\u2029 &lt;script&gt; \u202ereversed\u202c \x00\x07",
    "javascript:window.hacked=6 <a href='javascript:window.hacked=7'>here</a> <base href='//x/'>",
]


READY_SECONDS = 30


def prose(num_words: int, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    words = random.choice(WORDS, num_words)
    ends = random.choice([" ", " ", " ", " ", ", ", ".\n"], num_words)
    return "".join(word + end for word, end in zip(words, ends, strict=True))


@pytest.fixture(scope="module")
def runs(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    texts = [prose(900), prose(200, 1), "日本語 🙂 Maß\u00a0und Überraschung.\n"]
    folder = tmp_path_factory.mktemp("report")
    return toy_runs(folder / "runs", texts, byte_tokenizer_json, noises=(1.5, 0.01))


@pytest.fixture(scope="module")
def eight_runs(byte_tokenizer_json: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    noises = [0.1 * (n + 1) for n in range(7)]
    folder = tmp_path_factory.mktemp("eight")
    return toy_runs(folder / "runs", [prose(500)], byte_tokenizer_json, noises=noises)


@pytest.fixture(scope="module")
def report(runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return px.write_report(runs[:2], tmp_path_factory.mktemp("page") / "report.html").path


@pytest.fixture
def page(chromium: Any, report: Path) -> Any:
    return opened(chromium, report)


def opened(chromium: Any, path: Path) -> Any:
    chromium.get_log("browser")
    chromium.get_log("performance")
    chromium.get(path.as_uri())
    ready = "return document.documentElement.dataset.ready"
    deadline = time.monotonic() + READY_SECONDS  # a busy machine paints late
    while chromium.execute_script(ready) != "true" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert chromium.execute_script(ready) == "true"
    return chromium


def the(page: Any, selector: str) -> Any:
    return page.find_element("css selector", selector)


def every(page: Any, selector: str) -> list[Any]:
    return list(page.find_elements("css selector", selector))


def click(page: Any, selector: str) -> None:
    """A real click, once the element is in the middle of the screen."""
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", the(page, selector))
    the(page, selector).click()


def choose(page: Any, selector: str, value: str) -> None:
    """What a reader does with a select: the value, and the event that follows."""
    page.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1];"
        "s.dispatchEvent(new Event('change', {bubbles: true}))",
        selector,
        value,
    )


def losses(runs: list[Run]) -> tuple[np.ndarray, np.ndarray]:
    """Both runs' losses in reading order."""
    text = RunText.of(runs[0], px.TokenFile.open(runs[0].input_path))
    return text.values(runs[0].tokens.nll), text.values(runs[1].tokens.nll)


def test_the_verdict_comes_first_and_nothing_complains(page: Any, runs: list[Run]) -> None:
    comparison = px.compare(runs[0], runs[1])
    first = every(page, "h1, h2, h3")[0]
    assert first.tag_name == "h1"
    assert f"noise-1.5 is {comparison.verdict} than full" in first.text
    assert f"{comparison.ppl_ratio:.2f}"[:4] in first.text
    assert [entry["message"] for entry in page.get_log("browser")] == []


def test_no_request_leaves_the_page(page: Any) -> None:
    click(page, ".paper .t")
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert {url.split(":")[0] for url in urls} <= {"file", "data"}
    assert sum(url.startswith("file") for url in urls) == 1
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert every(page, "[src], link[href]:not([href^='data:'])") == []


def test_the_text_is_the_text(page: Any) -> None:
    shown = page.execute_script(
        "return view.pages.map((_, n) => { turnTo(n);"
        "document.querySelectorAll('.newline, .rest').forEach(e => e.remove());"
        "return [...document.querySelectorAll('.document-text')].map(d => d.textContent).join('')"
        "}).join('')"
    )
    assert shown == prose(900) + prose(200, 1) + "日本語 🙂 Maß\u00a0und Überraschung.\n"


def test_pointing_at_a_token_shows_both_losses_and_the_alternatives(
    page: Any, runs: list[Run]
) -> None:
    reference, candidate = losses(runs)
    token = the(page, ".t[data-i='30']")
    ActionChains(page).move_to_element(token).perform()
    text = the(page, "#details").text
    assert f"{reference[30]:.3f}" in text
    assert f"{candidate[30]:.3f}" in text
    assert f"{abs(candidate[30] - reference[30]):.3f}" in text
    assert len(every(page, "#details .alternatives li")) == 10
    row = int(np.flatnonzero(runs[0].tokens.token_index == 30)[0])
    best = np.exp(runs[0].tokens.top_logprobs[row, 0])
    assert f"{100 * best:.1f} %" in the(page, "#details .alternatives").text


def test_a_click_keeps_a_token_and_escape_lets_it_go(page: Any) -> None:
    click(page, ".t[data-i='12']")
    kept = the(page, "#details").text
    ActionChains(page).move_to_element(the(page, ".t[data-i='40']")).perform()
    assert the(page, "#details").text == kept
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    ActionChains(page).move_to_element(the(page, ".t[data-i='41']")).perform()
    assert the(page, "#details").text != kept


def test_the_keyboard_reaches_and_walks_the_text(page: Any) -> None:
    reached = []
    for _ in range(60):
        ActionChains(page).send_keys(Keys.TAB).perform()
        active = page.switch_to.active_element
        reached.append(active.get_attribute("id") or active.get_attribute("data-i") or "")
        if active.get_attribute("data-i"):
            break
    assert {"theme", "list-direction", "list-search", "colour", "filter", "page"} <= set(reached)
    first = int(reached[-1])  # Tab alone came to the text, at one token
    for key, expected in ((Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1)):
        ActionChains(page).send_keys(key).perform()
        current = int(page.switch_to.active_element.get_attribute("data-i"))
        assert current == first + expected
    assert f"token {current}" in the(page, "#details").text
    assert "loss in nats: full" in the(page, "#spoken").get_attribute("textContent")
    above = page.switch_to.active_element.location["y"]
    ActionChains(page).send_keys(Keys.ARROW_DOWN).perform()
    assert page.switch_to.active_element.location["y"] > above
    ActionChains(page).send_keys(Keys.PAGE_DOWN).perform()
    assert the(page, "#page").get_attribute("value") == "1"
    ActionChains(page).send_keys(Keys.ENTER).perform()
    assert "pinned" in the(page, "#details").get_attribute("class")


def test_the_filter_leaves_the_most_changed_tokens(page: Any, runs: list[Run]) -> None:
    reference, candidate = losses(runs)
    change = np.nan_to_num(np.abs(candidate.astype(np.float32) - reference.astype(np.float32)))
    choose(page, "#filter", "100")
    bright = page.execute_script(
        "const found = []; view.pages.forEach((_, n) => { turnTo(n);"
        "document.querySelectorAll('.paper .t:not(.dim):not(.gap)').forEach("
        "t => found.push(Number(t.dataset.i))) }); return found"
    )
    assert len(bright) == 100
    smallest = np.sort(change)[-100]
    assert min(change[i] for i in bright) >= smallest - 1e-6
    page.execute_script("turnTo(0)")
    the(page, "#paper [tabindex='0']").send_keys(Keys.ARROW_RIGHT)
    assert int(page.switch_to.active_element.get_attribute("data-i")) in bright
    choose(page, "#filter", "all")
    assert every(page, ".t.dim") == []


def test_the_list_filters_by_direction_and_text_and_leads_to_the_text(page: Any) -> None:
    choose(page, "#list-direction", "better")
    changes = [cell.text for cell in every(page, "#list tbody td:first-child")]
    assert changes
    assert all("−" in change and "▼" in change for change in changes)
    choose(page, "#list-direction", "worse")
    the(page, "#list-search").send_keys("su")
    tokens = [mark.text for mark in every(page, "#list tbody mark")]
    assert tokens
    assert all("su" in token.lower() for token in tokens)
    the(page, "#list-search").clear()
    the(page, "#list-search").send_keys("no such token")
    assert "No token is like that" in the(page, "#list tbody").text
    the(page, "#list-search").clear()
    the(page, "#list-search").send_keys(" ", Keys.BACKSPACE)
    before = len(every(page, "#list tbody tr"))
    click(page, "#list-more")
    assert len(every(page, "#list tbody tr")) > before
    fourth = "#list tbody tr:nth-child(4) a"
    wanted = the(page, fourth).get_attribute("data-token")
    click(page, fourth)
    assert page.switch_to.active_element.get_attribute("data-i") == wanted
    assert the(page, "#details").get_attribute("data-token") == wanted


def test_the_colours_follow_what_is_asked_for(page: Any, runs: list[Run]) -> None:
    reference, _ = losses(runs)
    modes = [option.text for option in every(page, "#colour option")]
    assert modes[0] == "Change, noise-1.5 − full"
    choose(page, "#colour", str(modes.index("Surprise, full")))
    hot = int(np.nanargmax(reference[:900]))
    cold = int(np.nanargmin(reference[:900]))
    level = {
        i: int(re.search(r"\bs(\d)", the(page, f".t[data-i='{i}']").get_attribute("class"))[1])
        for i in (hot, cold)
    }
    assert level[hot] > level[cold]
    assert "below 0.7" in the(page, "#legend").text
    colours = {
        the(page, f".t[data-i='{i}']").value_of_css_property("background-color")
        for i in (hot, cold)
    }
    assert len(colours) == 2


def test_light_and_dark(page: Any) -> None:
    def brightness() -> float:
        colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return float(np.mean([float(x) for x in re.findall(r"[\d.]+", colour)[:3]]))

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    assert brightness() > 200
    prefer("dark")
    assert brightness() < 60
    line = "return getComputedStyle(document.querySelector('svg.chart line')).stroke"
    dark_line = page.execute_script(line)
    the(page, "#theme").click()
    assert brightness() > 200
    assert page.execute_script(line) != dark_line  # charts follow
    prefer("light")


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_nothing_overflows_at_any_width(page: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        if width == 360:  # rows become cards: no table of the page itself is cut off
            hidden = page.execute_script(
                "return [...document.querySelectorAll('main section > .scroll')]"
                ".filter(box => box.scrollWidth > box.clientWidth + 1)"
                ".map(box => box.querySelector('table').className)"
            )
            assert hidden == []
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        assert the(page, "#paper").size["width"] > width * 0.5
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_that_can_be_operated_has_a_name(page: Any) -> None:
    tree = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    operable = {"button", "link", "combobox", "searchbox", "textbox", "checkbox"}
    seen = set()
    for node in tree:
        role = node.get("role", {}).get("value")
        if role in operable and not node.get("ignored"):
            seen.add(role)
            assert node.get("name", {}).get("value", "").strip(), node
    assert {"button", "link", "combobox", "searchbox"} <= seen
    roles = [node.get("role", {}).get("value") for node in tree]
    assert roles.count("main") == 1
    assert roles.count("figure") >= 5
    marks = page.execute_script(
        "return document.querySelectorAll('svg.chart [aria-roledescription] > title').length"
    )
    assert marks > 10


def test_it_prints_without_controls(page: Any) -> None:
    printed = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not the(page, "#text-controls").is_displayed()
        assert the(page, "#paper").is_displayed()
        assert the(page, "h1").is_displayed()
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_hostile_corpus_is_shown_and_does_nothing(
    chromium: Any, byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    text = "".join(HOSTILE)
    runs = toy_runs(tmp_path / "runs", [text, *HOSTILE], byte_tokenizer_json)
    report = px.write_report(
        runs, tmp_path / "r.html", labels=["<b>ref</b>", "</title><script>hacked=8</script>"]
    )
    page = opened(chromium, report.path)
    assert page.execute_script("return window.hacked") is None
    assert len(every(page, "script")) == 2
    assert every(page, "img, iframe, svg:not(.chart), base, b") == []
    for link in every(page, "a"):
        assert link.get_attribute("href").startswith("file:")
    shown = page.execute_script(
        "const c = document.querySelector('.document-text').cloneNode(true);"
        "c.querySelectorAll('.newline, .rest').forEach(e => e.remove()); return c.textContent"
    )
    assert shown == text
    for index in range(0, 60, 7):
        ActionChains(page).move_to_element(the(page, f".t[data-i='{index}']")).perform()
    for value in ("worse", "better", "both"):
        choose(page, "#list-direction", value)
    assert "<b>ref</b>" in the(page, "#details").text
    assert page.execute_script("return window.hacked") is None
    assert [entry["message"] for entry in page.get_log("browser")] == []
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 9';"
        "document.body.append(s); document.body.insertAdjacentHTML('beforeend',"
        "'<img src=x onerror=\"window.hacked = 10\">')"
    )
    assert page.execute_script("return window.hacked") is None  # the policy stops what escaped us
    refused = [entry["message"] for entry in page.get_log("browser")]
    assert any("Content Security Policy" in message for message in refused)


def test_50000_tokens_open_fast_and_stay_small(
    chromium: Any, byte_tokenizer_json: Path, tmp_path: Path, record_property: Any
) -> None:
    texts = [prose(8_000, seed) for seed in range(2)]
    runs = toy_runs(tmp_path / "runs", texts, byte_tokenizer_json, top_k=8, max_length=256)
    assert runs[0].num_tokens >= 50_000
    report = px.write_report(runs, tmp_path / "r.html")
    assert report.num_tokens_shown >= 50_000
    page = opened(chromium, report.path)
    milliseconds = page.execute_script(
        "return performance.getEntriesByType('navigation')[0].loadEventEnd"
    )
    record_property("tokens", report.num_tokens_shown)
    record_property("megabytes", report.num_bytes / 1e6)
    record_property("open_seconds", milliseconds / 1000)
    print(f"{report.num_tokens_shown} tokens, {report.num_bytes / 1e6:.2f} MB, {milliseconds} ms")
    assert report.num_bytes < 15e6
    assert milliseconds < 3000
    assert len(every(page, ".paper .t")) < 2000  # a page of them, not all


@pytest.mark.parametrize("chosen", [(1, 2, 3), (5, 7), (1, 4, 6)])
def test_with_eight_runs_a_curve_has_the_name_and_colour_of_its_run(
    chromium: Any,
    eight_runs: list[Run],
    chosen: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """The chart's legend against the dots of the table, as the browser paints both."""
    runs = [with_kl(r, eight_runs[0]) if n in chosen else r for n, r in enumerate(eight_runs)]
    page = opened(chromium, px.write_report(runs, tmp_path / "r.html").path)
    dots = page.execute_script(
        "return Object.fromEntries([...document.querySelectorAll('.runs th[scope=row]')].map(th =>"
        "[th.childNodes[1].textContent.trim(),"
        " getComputedStyle(th.querySelector('.swatch')).backgroundColor]))"
    )
    for name in ("kl", "agreement", "change"):
        legend = page.execute_script(
            "return Object.fromEntries([...document.querySelectorAll("
            "`#chart-${arguments[0]} .role-legend-symbol path`)].map((path, n) =>"
            "[document.querySelectorAll(`#chart-${arguments[0]} .role-legend-label text`)[n]"
            ".textContent, getComputedStyle(path).stroke]).filter(([, c]) => c !== 'none'))",
            name,
        )
        legend.pop("worse", None)
        legend.pop("better", None)
        labels = list(dots) if name != "kl" else ["", *[list(dots)[n] for n in chosen]]
        assert legend == {label: dots[label] for label in labels[1:]}, name
    lines = page.execute_script(
        "return [...document.querySelectorAll('#chart-kl .mark-line path')]"
        ".map(path => getComputedStyle(path).stroke)"
    )
    assert set(lines) == {dots[list(dots)[n]] for n in chosen}
    offered = page.execute_script(
        "return [...document.querySelectorAll('#colour option')].map(o => o.textContent)"
        ".filter(text => text.startsWith('KL'))"
    )
    assert [text.rpartition(", ")[2] for text in offered] == [list(dots)[n] for n in chosen]


def test_four_verdicts_are_told_by_word_sign_and_colour_and_fit(
    chromium: Any, byte_tokenizer_json: Path, tmp_path: Path
) -> None:
    texts = [prose(30, seed) for seed in range(24)]
    (full,) = toy_runs(tmp_path / "runs", texts, byte_tokenizer_json, noises=())
    moved = with_kl(shifted(full, 0.1, spread=1.0), full, scale=0.3)
    runs = [full, shifted(full, 0.2), shifted(full, -0.2), shifted(full, 0.001, 0.001), moved]
    labels = ["full", "int4", "tuned", "bf16", "nf4"]
    for chosen in (runs, [full, moved]):
        written = px.write_report(
            chosen, tmp_path / f"{len(chosen)}.html", labels=labels[: len(chosen)], margin="1%"
        )
        page = opened(chromium, written.path)
        assert the(page, "h1").text.split() == written.headline.split()
        for width in (320, 800, 1280):
            page.set_window_size(max(width, 500), 900)
            page.execute_script("document.body.style.width = `${arguments[0]}px`", width)
            for selector in ("h1", ".finding"):
                assert page.execute_script(
                    "return [...document.querySelectorAll(arguments[0])]"
                    ".every(e => e.scrollWidth <= e.clientWidth + 1)",
                    selector,
                ), (width, selector)
        page.set_window_size(1280, 900)
        if len(chosen) == 2:
            continue
        for theme in ("light", "dark"):
            badges = page.execute_script(
                "document.documentElement.dataset.theme = arguments[0];"
                "return [...document.querySelectorAll('.runs .badge')].map("
                "b => [b.textContent.trim(), getComputedStyle(b).color])",
                theme,
            )
            words = ["reference", "▲ worse", "▼ better", "= equivalent", "? inconclusive"]
            assert [text for text, _ in badges] == words
            assert len({colour for _, colour in badges[1:]}) == 4


def test_several_candidates_and_one_run_alone(
    chromium: Any, runs: list[Run], tmp_path: Path
) -> None:
    page = opened(chromium, px.write_report(runs, tmp_path / "three.html").path)
    assert len(every(page, ".runs tbody tr")) == 3
    choose(page, "#list-run", "2")
    assert the(page, "#list-candidate").text == "noise-0.01"
    page = opened(chromium, px.write_report(runs[:1], tmp_path / "one.html").path)
    assert "full has a perplexity of" in the(page, "h1").text
    assert "Most surprising tokens" in the(page, "#changed-title").text
    assert every(page, "#list tbody tr")
    assert [entry["message"] for entry in page.get_log("browser")] == []


@pytest.fixture(scope="module")
def experiment_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    document = document_of(title="old addresses, new objective")
    return px.write_report([experiment_folder(folder, document)], folder / "r.html").path


def test_an_experiment_alone_is_a_page_of_its_own(chromium: Any, experiment_report: Path) -> None:
    page = opened(chromium, experiment_report)
    assert [entry["message"] for entry in page.get_log("browser")] == []
    assert the(page, "h1").text.startswith("Selecting by igf-quantile ends at 0.7")
    assert "old addresses, new objective" in the(page, "#igf-1-title").text
    rows = [row.text for row in every(page, "#igf-1 table.runs tbody tr")]
    assert [row.split("\n")[0] for row in rows] == list(GAINS)
    assert ["better" in row for row in rows] == [False, True, False, False]
    assert len(every(page, "#igf-1 svg.chart")) == 3
    assert every(page, "#text, #conditions, [src]") == []
    marks = every(page, "#chart-igf-1-curves [aria-label^='igf-quantile, step 30: ']")
    assert len(marks) == 1
    the(page, "nav a").click()
    assert page.execute_script("return location.hash") == "#igf-1"
    the(page, "#igf-1 .more-conditions summary").click()
    assert "learning rate" in the(page, "#igf-1 .more-conditions").text


@pytest.mark.parametrize("width", [420, 1280])
def test_an_experiment_fits_and_follows_the_theme(
    chromium: Any, experiment_report: Path, width: int
) -> None:
    page = opened(chromium, experiment_report)
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        line = "getComputedStyle(document.querySelector('#chart-igf-1-curves path[stroke]')).stroke"
        colours = set()
        for theme in ("light", "dark"):
            page.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
            colours.add(page.execute_script(f"return {line}"))
        assert len(colours) == 2
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_names_in_an_experiment_do_nothing(
    chromium: Any, runs: list[Run], tmp_path: Path
) -> None:
    names = {"standard": 0.3} | {text: 0.4 + i / 10 for i, text in enumerate(HOSTILE)}
    document = document_of(names, title=HOSTILE[0], model=HOSTILE[1])
    document["learner"]["kind"] = HOSTILE[2]
    document["plan"]["settings"][HOSTILE[1]] = HOSTILE[0]
    folder = experiment_folder(tmp_path / "experiment", document)
    for beside in ([], runs[:1]):
        report = px.write_report([*beside, folder], tmp_path / f"{len(beside)}.html")
        page = opened(chromium, report.path)
        assert page.execute_script("return window.hacked") is None
        assert len(every(page, "script")) == 1 + len(beside)
        assert every(page, "img, iframe, svg:not(.chart), base, b") == []
        for link in every(page, "a"):
            assert link.get_attribute("href").startswith("file:")
        shown = [row.get_attribute("textContent") for row in every(page, "#igf-1 th[scope=row]")]
        assert shown[1].strip().startswith(HOSTILE[0])
        assert HOSTILE[0] in the(page, "#igf-1-title").get_attribute("textContent")
        assert [entry["message"] for entry in page.get_log("browser")] == []
