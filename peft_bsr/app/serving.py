"""Serves the page; by default only on this machine."""

from __future__ import annotations

import gradio as gr

from peft_bsr.app.page import THEME, make_page
from peft_bsr.app.style import CSS

MOST_UPLOADED = "10mb"
MOST_WAITING = 32  # requests in the queue


def serve(host: str = "127.0.0.1", port: int | None = None, root_path: str | None = None) -> gr.Blocks:
    """Serve the page in a thread; `block_thread()` of the returned page waits, `close()` stops the server.

    The app does not use the network. Uploads are deleted after ten minutes, and when the server stops.

    Args:
        host: Address to listen on. Default `"127.0.0.1"`: only this machine.
        port: Port. Default None: the first free one from 7860 on.
        root_path: Path prefix of a reverse proxy, such as `"/plan"`. Default None.

    Returns:
        The page; its URL is `local_url`.

    Raises:
        OSError: If the port is taken.
    """
    page = make_page().queue(max_size=MOST_WAITING)
    page.launch(
        server_name=host,
        server_port=port,
        root_path=root_path,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=MOST_UPLOADED,
        footer_links=[],
        theme=THEME,
        css=CSS,
    )
    return page


__all__ = ["MOST_UPLOADED", "MOST_WAITING", "serve"]
