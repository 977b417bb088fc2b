"""The page in a real browser: it loads without complaint, shows the picture under the cursor, and filters by class."""

import shutil

import pytest
import torch

from lightning_feat.report import feature_report
from tests.report.pages import N, made

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium"),
]
BAD = "<b>x</b><img src=x onerror=window.broken=1>"


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    features, targets, logits = made()
    made_page = feature_report(
        {"fc": features, "body": features**2},
        targets,
        logits=logits,
        pictures=torch.rand(N, 3, 20, 20),
        class_names=[BAD, "b", "c"],
        names=[f"{BAD}{i}.png" for i in range(N)],
        before={"fc": features + 1, "body": features**2 + 0.5},
        basis=torch.linalg.qr(torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(1)))[0].mT,
        out=tmp_path_factory.mktemp("page") / "page.html",
    )
    return made_page.path


@pytest.fixture
def opened(browser, path):
    """Opens the page; in the end nothing was complained of, and nothing was asked from elsewhere."""
    contexts, said = [], []

    def open_page(width=1280, theme="light", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else said.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function("featureReport.views['map-0'] && featureReport.views['movement-all/0']", timeout=60_000)
        return page

    yield open_page
    broken = [page.evaluate("window.broken") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert said == []
    assert not any(broken), "a label was run as code"


def place(page, row):
    page.locator("#map-0").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('#map-0').scrollIntoView()")
    return page.evaluate(f"featureReport.maps[0].place({row})")


def test_it_loads_and_each_panel_has_title_unit_and_content(opened):
    page = opened()
    articles = page.locator("article:visible")
    assert articles.count() == 8
    for i in range(articles.count()):
        article = articles.nth(i)
        assert article.locator("h3").inner_text().strip()
        assert article.locator(".unit").inner_text().strip()
        assert article.locator("svg, canvas, figure").count() > 0, article.get_attribute("id")
    assert page.title() == "Features"


def test_hovering_shows_the_picture_and_what_is_known(opened):
    page = opened()
    page.mouse.move(*place(page, 7))
    tip = page.locator("#tip")
    tip.wait_for(state="visible")
    row = int(tip.get_attribute("data-row"))
    assert f"{BAD}{row}.png #{row}" in tip.inner_text()
    tile = tip.locator(".tile")
    assert "blob:" in tile.evaluate("e => getComputedStyle(e).backgroundImage")
    assert tile.bounding_box()["width"] > 60
    page.mouse.move(5, 5)
    tip.wait_for(state="hidden")


def test_the_picture_is_that_of_the_sample(opened, path):
    page = opened()
    shift = page.evaluate(
        """() => { const m = featureReport.maps[0]; m.choose(13);
        const s = featureReport.data.sheet; const t = document.querySelector('#map-0 .chosen .tile');
        const k = t.getBoundingClientRect().width / s.width;
        const [x, y] = getComputedStyle(t).backgroundPosition.split(' ').map((v) => -parseFloat(v) / k);
        return [x / s.width + s.columns * y / s.height]; }"""
    )
    assert abs(shift[0] - 13) < 1e-3


def test_a_click_on_a_class_leaves_that_class_alone(opened):
    page = opened()
    chip = page.locator("#map-0 .legend [data-class='1']")
    assert chip.get_attribute("aria-pressed") == "false"
    chip.click()
    page.wait_for_function("featureReport.views['map-0'].signal('shown').length === 1")
    page.wait_for_timeout(200)
    assert page.locator("#map-0 .chart.map svg .layer_0_marks path").count() == N // 3
    assert chip.get_attribute("aria-pressed") == "true"
    rows = page.locator("#hardest-all figure").evaluate_all("all => all.map((e) => Number(e.dataset.row) % 3)")
    assert {*rows} == {1}
    page.locator("#map-0 .legend .all").click()
    page.wait_for_timeout(200)
    assert page.locator("#map-0 .chart.map svg .layer_0_marks path").count() == N


def test_a_click_on_a_point_shows_its_neighbours_and_so_does_its_number(opened):
    page = opened()
    page.mouse.click(*place(page, 4))
    chosen = page.locator("#map-0 .chosen figure").first
    row = int(chosen.get_attribute("data-row"))
    near = page.locator("#map-0 .near figure").evaluate_all("all => all.map((e) => Number(e.dataset.row))")
    assert near == page.evaluate("featureReport.maps[0].near()")
    assert len(near) == 8
    assert row not in near
    page.locator("#map-0 .which").fill("21")
    page.keyboard.press("Enter")
    assert page.locator("#map-0 .chosen figure").first.get_attribute("data-row") == "21"


def test_colours_can_be_changed_and_the_theme_follows_the_reader(opened):
    page = opened(theme="dark")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    for name in ("correctness", "loss", "class"):
        page.locator("#map-0 .colour").select_option(name)
        page.wait_for_timeout(200)
    page.locator("#theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_phone_has_no_sideways_scroll_and_can_tap(opened):
    page = opened(width=390, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.touchscreen.tap(*place(page, 3))
    page.locator("#map-0 .near").wait_for(state="visible")


def test_another_layer_is_drawn_when_it_is_opened(opened):
    page = opened()
    page.locator("#layer-1 > summary").click()
    page.wait_for_function("featureReport.views['map-1']")
    assert page.locator("#map-1 .legend button").count() == 4
