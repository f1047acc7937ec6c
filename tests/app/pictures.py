"""Draw the pictures of docs/app.md, or every tab at both widths and in both schemes to look at.

    python tests/app/pictures.py --model WinKawaks/vit-tiny-patch16-224 [--folder docs/images] [--every]

Needs the extra `app`, playwright, and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = Path(__file__).parents[2] / "docs" / "images"
HIGH = {"plans": 1000, "kept": 860, "results": 1000}  # pixels of a picture in the documentation


def main() -> None:
    """Serve the app and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id or folder of a model with weights, for the second tab")
    parser.add_argument("--folder", type=Path, default=PICTURES, help="default docs/images")
    parser.add_argument("--every", action="store_true", help="1280 and 390 pixels, light and dark, the whole height")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright  # here, so that pytest collects the file without it

    from peft_bsr.app.serving import serve

    page = serve()
    views = [(w, s) for w in (1280, 390) for s in ("light", "dark")] if args.every else [(1280, "light")]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for width, scheme in views:
            tab = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
            tab.set_default_timeout(600_000)
            tab.goto(page.local_url)
            for name, show in {"plans": show_plans, "results": show_results, "kept": show_kept}.items():
                tab.set_viewport_size({"width": 1280, "height": 900})  # a narrow one puts a tab into a menu
                show(tab, args.model)
                tab.set_viewport_size({"width": width, "height": 900})
                path = args.folder / (f"app-{name}-{width}-{scheme}.png" if args.every else f"app-{name}.png")
                tab.screenshot(path=path, full_page=args.every)
                if not args.every:
                    tab.set_viewport_size({"width": width, "height": HIGH[name]})
                    tab.screenshot(path=path)
                    Image.open(path).quantize(128).save(path, optimize=True)
                print(path, flush=True)
        browser.close()
    page.close()


def show_plans(tab: Any, model: str) -> None:
    """The first tab, all its plans."""
    tab.wait_for_function("document.querySelectorAll('#plans h3').length == 10")


def show_results(tab: Any, model: str) -> None:
    """The third tab, a point chosen."""
    tab.get_by_role("tab", name="What it costs").click()
    tab.wait_for_selector("#results .point")
    tab.locator("#results .point.front").nth(2).focus()


def show_kept(tab: Any, model: str) -> None:
    """The second tab."""
    tab.get_by_role("tab", name="What is kept").click()
    field = tab.locator("#kept-model input")
    field.fill(model)
    field.press("Enter")
    tab.get_by_role("button", name="Draw").click()
    tab.wait_for_selector("#kept img")


if __name__ == "__main__":
    main()
