"""report.html in a real browser, on a telephone's width, with nothing to fetch and no script allowed."""

from __future__ import annotations

import html
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from report_runs import full_run

from moect.monitor.reporting.page.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

# the report stands in a frame in which scripts are forbidden; this page looks into it and writes down what it sees
LOOK = """<!doctype html><meta charset="utf-8">
<iframe id="frame" src="/report.html" sandbox="allow-same-origin" width="360" height="800" style="border:0"></iframe>
<pre id="seen"></pre>
<script>
function pixels(text, font) {
  const canvas = document.createElement("canvas"); canvas.width = 60; canvas.height = 60;
  const context = canvas.getContext("2d"); context.font = font; context.fillText(text, 10, 40);
  return canvas.toDataURL();
}
window.onload = () => {
  const frame = document.getElementById("frame"), page = frame.contentDocument, view = frame.contentWindow;
  const wide = [...page.querySelectorAll("body *")].filter(e => !e.parentElement.closest(".scroll, pre"));
  const font = "32px " + view.getComputedStyle(page.body).fontFamily;
  const box = pixels("\\u0378", font);  // a character that does not exist
  const isDrawn = text => ![box, pixels(" ", font)].includes(pixels(text, font));
  document.getElementById("seen").textContent = JSON.stringify({
    width: page.documentElement.clientWidth,
    content: page.documentElement.scrollWidth,
    beyond: wide.filter(e => e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 80)),
    images: [...page.images].map(i => [i.naturalWidth, i.naturalHeight, i.clientWidth, i.alt.length]),
    scrolling: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
    deadLinks: [...page.querySelectorAll("nav a")].filter(a => !page.querySelector(a.getAttribute("href"))).length,
    fetched: view.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    text: page.body.innerText,
    languages: [...page.querySelectorAll("[dir=auto]")].map(e => e.lang),
    drawn: {ta: isDrawn("\\u0ba4"), zh: isDrawn("\\u4eac"), bn: isDrawn("\\u09ac"), box: isDrawn("\\u0379")},
  });
};
</script>"""


@pytest.fixture
def seen(tmp_path):
    """What the browser sees, and the paths that it asked for."""
    page, _ = write_report(full_run(tmp_path / "run", new=("sw", "ta", "bn"), domains=("web",), blocks=3))
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = {"/": LOOK.encode(), "/report.html": page.read_bytes()}.get(self.path)
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [
            "--headless=new",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        address = f"http://127.0.0.1:{server.server_port}/"
        result = subprocess.run([BROWSER, *flags, "--dump-dom", address], capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = re.search(r'<pre id="seen">(.+?)</pre>', result.stdout, re.S)
    assert found, result.stderr[-2000:]
    return json.loads(html.unescape(found[1])), asked


def has_font(lang: str) -> bool:
    listed = shutil.which("fc-list") and subprocess.run(["fc-list", f":lang={lang}"], capture_output=True, text=True)
    return bool(listed and listed.stdout.strip())


def test_the_page_is_whole_by_itself_fits_a_telephone_and_shows_every_script(seen):
    seen, asked = seen
    assert (seen["fetched"], [path for path in asked if path not in ("/", "/favicon.ico")]) == ([], ["/report.html"])
    assert (seen["width"], seen["content"], seen["beyond"]) == (360, 360, [])
    assert seen["scrolling"] >= 2  # wide tables scroll in their own boxes
    assert len(seen["images"]) == 10
    for width, height, shown, described in seen["images"]:
        assert width > 600 and height > 200 and 300 < shown <= 360 and described > 10
    assert seen["deadLinks"] == 0
    for word in ("Within the limits", "செம்மொழி", "北京", "বাংলা", "<b>1</b> & the"):
        assert word in seen["text"]
    assert {"ta", "zh", "bn", "sw", "en"} <= set(seen["languages"])
    assert not seen["drawn"]["box"]  # the look can tell a box from a letter
    for lang in ("ta", "zh", "bn"):
        assert seen["drawn"][lang] or not has_font(lang), lang
