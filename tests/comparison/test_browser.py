"""The report in a real browser: drawn without errors, used with mouse and keyboard, not hurt.

Needs Debian's packages chromium and chromium-driver.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_exp.comparison.value import compare
from tests.comparison.sweeps import HOSTILE, write_sweep

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1300,1000", "--hide-scrollbars",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium: reports are not tested in a browser"
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, paths = tmp_path_factory.mktemp("reports"), {}
    for name, options in (("plain", {}), ("hostile", {"hostile": True, "ranks": (4,)})):
        sweep = write_sweep(folder / name, **options)  # type: ignore[arg-type]
        title = HOSTILE if name == "hostile" else "sweep"
        paths[name] = folder / f"{name}.html"
        paths[name].write_text(compare(sweep).to_html(title), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser: Any, reports: dict[str, Path]) -> Iterator[Any]:
    """The plain report, opened once; the browser's log must stay empty."""
    if browser.current_url != reports["plain"].as_uri():
        open_report(browser, reports["plain"])
    yield browser
    assert browser.get_log("browser") == []


def open_report(browser: Any, path: Path) -> None:
    browser.get(path.as_uri())
    browser.execute_script("document.documentElement.style.scrollBehavior = 'auto'")


def all_drawn(browser: Any) -> list[str]:
    """Scroll to each figure, wait until it is drawn, and return their headings."""
    return list(
        browser.execute_async_script(
            """
            const done = arguments[0], plots = [...document.querySelectorAll(".plot")];
            (async () => {
              for (const plot of plots) {
                plot.scrollIntoView({ block: "center" });
                while (!plot.querySelector(".main-svg"))
                  await new Promise((next) => setTimeout(next, 20));
              }
              done(plots.map((plot) => plot.closest("figure").querySelector("h3").textContent));
            })();
            """
        )
    )


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def find_all(browser: Any, selector: str) -> list[Any]:
    return list(browser.find_elements("css selector", selector))


def click(browser: Any, element: Any) -> None:
    """Click an element that the bar on top may cover."""
    browser.execute_script("arguments[0].scrollIntoView({ block: 'center' })", element)
    element.click()


def scheme(browser: Any, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    # the page hears of it before the next frame
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")


def test_every_figure_is_drawn_and_nothing_is_loaded(page: Any) -> None:
    assert all_drawn(page) == [
        "Evaluation", "Training loss", "Rungs", "The objective against each key",
        "Importance of the keys", "Quality and cost", "Parallel coordinates", "Each task",
        "Where layers changed",
    ]  # fmt: skip
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert len(find_all(page, "main figure .scatterlayer .trace")) > 50


def test_hovering_a_point_shows_its_group_and_value(page: Any) -> None:
    from selenium.webdriver import ActionChains

    all_drawn(page)
    plot = find(page, "[data-figure=by_key]")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    point = find_all(page, "[data-figure=by_key] .scatterlayer .points path")[-1]
    ActionChains(page, duration=20).move_to_element(point).move_by_offset(1, 0).perform()
    text = find(page, "[data-figure=by_key] .hoverlayer").text
    assert "train.learning_rate" in text
    assert ": " in text


def test_answers_are_filtered_where_they_differ(page: Any) -> None:
    rows = "#samples-table tbody tr"
    count = len(find_all(page, rows))
    page.execute_script("document.getElementById('samples-show').value = 'differ'")
    page.execute_script("document.getElementById('samples-show').dispatchEvent(new Event('input'))")
    kept = [
        [cell.text for cell in row.find_elements("css selector", "td")]
        for row in find_all(page, rows)
    ]
    assert 0 < len(kept) < count
    assert all(len(set(answers)) > 1 for _, _, *answers in kept)
    find(page, "#samples-words").send_keys("no such text")
    assert find_all(page, rows) == []
    assert find(page, "#samples-count").text.startswith("0 of")


def test_other_runs_can_be_put_side_by_side(page: Any) -> None:
    assert len(find_all(page, "#samples-table thead th")) == 2 + 3
    page.execute_script("document.querySelector('#samples-runs').closest('details').open = true")
    for box in find_all(page, "#samples-runs input")[1:3]:
        click(page, box)
    assert len(find_all(page, "#samples-table thead th")) == 2 + 5


def test_a_heading_sorts_and_a_csv_has_the_tables_numbers(page: Any) -> None:
    heads = find_all(page, "#groups thead button")
    loss = next(head for head in heads if head.text == "eval/loss")
    values = """return [...document.querySelectorAll('#groups tbody tr')]
        .map((row) => Number(row.cells[3].dataset.value))"""
    click(page, loss)
    ascending = page.execute_script(values)
    click(page, loss)
    assert ascending == sorted(ascending) == page.execute_script(values)[::-1]
    saved = page.execute_async_script(
        """
        const done = arguments[0];
        URL.createObjectURL = (blob) => { blob.text().then(done); return "data:,"; };
        HTMLAnchorElement.prototype.click = () => {};
        document.querySelector("[data-csv=groups]").click();
        """
    )
    lines = saved.splitlines()
    assert lines[0].startswith(
        "group,peft.r,train.learning_rate,eval/loss,eval/loss: interval or spread"
    )
    assert len(lines) == 10
    assert float(lines[1].split(",")[3]) == ascending[-1]


def test_the_keyboard_highlights_a_group_in_the_figures(page: Any) -> None:
    from selenium.webdriver import Keys

    all_drawn(page)
    button = find(page, "#groups tbody [data-group='0']")
    button.send_keys(Keys.ENTER)
    assert {b.get_attribute("aria-pressed") for b in find_all(page, "[data-group='0']")} == {"true"}
    faint = """return document.querySelector('[data-figure=parallel]').data
        .filter((trace) => trace.opacity === 0.1).length"""
    assert page.execute_script(faint) == 24
    button.send_keys(Keys.SPACE)
    assert page.execute_script(faint) == 0


def test_a_dark_scheme_has_dark_paper_and_lighter_lines(page: Any) -> None:
    look = """return [getComputedStyle(document.body).backgroundColor,
        document.querySelector('[data-figure=evaluation]').data.at(-2).line.color]"""
    all_drawn(page)
    assert page.execute_script(look) == ["rgb(255, 255, 255)", "#0072b2"]
    scheme(page, "dark")
    assert page.execute_script(look) == ["rgb(20, 23, 28)", "#4ba3e3"]
    scheme(page, "light")


def test_hostile_texts_are_shown_and_not_executed(browser: Any, reports: dict[str, Path]) -> None:
    open_report(browser, reports["hostile"])
    assert len(all_drawn(browser)) >= 7
    assert browser.execute_script("return window.hurt") is None
    assert browser.title.startswith("</script><script>window.hurt=1</script>")
    assert "onerror='window.hurt=1'" in find(browser, "#groups").text
    assert find_all(browser, "img, script[src], iframe, svg a") == []
    assert browser.get_log("browser") == []


def test_all_figures_are_printed(page: Any) -> None:
    pdf = page.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(pdf) > 100_000
    assert len(find_all(page, ".plot .main-svg")) >= 8
