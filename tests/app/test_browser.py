"""The page itself, in headless Chromium: what it shows is what the Python API says, and it asks no other host."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from peft_bsr.app.kept import keep, photograph
from peft_bsr.app.planning import Question, plans_of, shell_of
from peft_bsr.app.results import choose

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MODEL = "WinKawaks/vit-tiny-patch16-224"
SECONDS = 240  # of a machine that does other things too


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("gradio", reason="gradio is not installed (`pip install 'peft-bsr[app]'`)")
    from peft_bsr.app.serving import serve

    served = serve()
    yield served
    served.close()


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (`pip install playwright`)")
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(scope="module")
def tab(page, chromium) -> Iterator:
    """The page; `hosts` collects every host that anything was asked of."""
    opened = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="dark")
    opened.set_default_timeout(1000 * SECONDS)
    opened.hosts = set()
    opened.on("request", lambda request: opened.hosts.add(urlsplit(request.url).hostname))
    opened.goto(page.local_url)
    return opened


@pytest.mark.slow
def test_the_html_names_no_script_or_style_of_another_host(page):
    html = urllib.request.urlopen(page.local_url).read().decode()
    loaded = re.findall(r"<(?:script|link)[^>]*(?:src|href)=[\"']?([^\"' >]+)", html)
    assert loaded and not [url for url in loaded if urlsplit(url).hostname not in (None, "127.0.0.1")]


@pytest.mark.slow
def test_all_three_tabs(tab, tmp_path):
    # what fits: the page's own first question, then another one
    tab.wait_for_selector("#plans h3")
    question = Question(MODEL, gib=8.0)
    plans = list(plans_of(question))[-1]
    model = tab.locator("#plans-model input")
    model.fill(MODEL)
    model.press("Enter")
    tab.get_by_role("button", name="Plan", exact=True).click()
    headings = tab.locator("#plans h3")
    tab.wait_for_function(
        "([n, first]) => {const h = document.querySelectorAll('#plans h3'); "
        "return h.length == n && h[0].textContent.startsWith(first)}",
        arg=[len(plans), f"1. {plans[0].estimate.total_bytes / 2**20:,.0f} MiB"],
    )
    for plan, heading in zip(plans, headings.all_inner_texts(), strict=True):
        assert f"{plan.estimate.total_bytes / 2**20:,.0f} MiB. Gives up: {plan.gives_up}" in heading
    assert shell_of(plans[0], question).split()[1] in tab.locator("body").inner_text()
    # another plan's lines, and less memory at once, because the estimates are known
    tab.get_by_label("Lines that run plan").click()
    tab.get_by_role("option").nth(1).click()
    line = "".join(shell_of(plans[1], question).split())
    tab.wait_for_function("line => document.body.innerText.replace(/\\s/g, '').includes(line)", arg=line)
    box = tab.get_by_label("number input for Memory, GiB")
    box.fill("0.25")
    box.press("Tab")
    first = list(plans_of(Question(MODEL, gib=0.25)))[-1][0]
    assert first.describe() != plans[0].describe()
    tab.wait_for_function(
        "text => document.querySelector('#plans h3').textContent.startsWith(text)",
        arg=f"1. {first.estimate.total_bytes / 2**20:,.0f} MiB. Gives up: {first.gives_up}",
    )
    # what it costs and reaches
    tab.get_by_role("tab", name="What it costs").click()
    tab.wait_for_selector("#results .point")
    assert tab.locator("#results .point").count() == len(choose("cifar10"))
    point = tab.locator("#results .point").last
    point.focus()
    told = tab.locator("#results .point:focus + .about")
    assert "run.py" in told.inner_text() and told.is_visible()
    tab.get_by_label("fashion-mnist").check()
    tab.wait_for_function("document.querySelector('#results .about:not(.first)').textContent.includes('fashion')")
    # nothing is wider than a phone, and nothing was asked of another host
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    tab.set_viewport_size({"width": 1280, "height": 900})
    assert tab.hosts == {"127.0.0.1"}


@pytest.mark.slow
def test_what_is_kept_and_what_cannot_be_read(tab, tiny):
    tab.get_by_role("tab", name="What is kept").click()
    model = tab.locator("#kept-model input")
    for source, found in (("/no/such/folder", ".wrong"), (str(tiny), "img")):
        model.fill(source)
        model.press("Enter")
        tab.get_by_role("button", name="Draw").click()
        tab.wait_for_selector(f"#kept {found}")
    view = keep(str(tiny), photograph("china.jpg"), 0.5)
    captions = tab.locator("#kept figcaption").all_inner_texts()
    assert all(f"{tokens} tokens" in text for tokens, text in zip(view.tokens, captions[1:], strict=True))
    assert f"{view.flops / 1e9:.2f} GFLOPs" in tab.locator("#kept").inner_text()
    slider = tab.get_by_role("slider", name="Kept at each reduction")
    slider.focus()
    slider.press("End")
    more = keep(str(tiny), photograph("china.jpg"), 0.95).tokens[-1]
    assert more != view.tokens[-1]
    tab.wait_for_function(f"document.querySelector('#kept').textContent.includes('{more} tokens')")


@pytest.mark.slow
def test_an_upload_is_limited_and_gone_when_the_server_is(monkeypatch, tmp_path):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed (`pip install 'peft-bsr[app]'`)")
    import httpx

    from peft_bsr.app.serving import serve

    assert gradio
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    served = serve(root_path="/plan")
    try:
        assert urlsplit(json.loads(urllib.request.urlopen(served.local_url + "config").read())["root"]).path == "/plan"
        url = served.local_url + "gradio_api/upload"
        too_large = httpx.post(url, files={"files": ("a.png", b"0" * 11_000_000)})
        assert too_large.status_code == 413
        small = httpx.post(url, files={"files": ("a.png", b"0" * 1000)})
        assert Path(small.json()[0]).exists()
    finally:
        served.close()
    assert not list((tmp_path / "files").rglob("*.png"))
