"""The web page: what it is served with, that it loads nothing from elsewhere, and what a browser does with it."""

from __future__ import annotations

import re
import shutil
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest
from service_cases import PROMPT, opened_services, served

from deltakeeper.live_base import open_base
from deltakeeper.service import status
from deltakeeper.service.admission import decisions, deltas
from deltakeeper.service.assembly import Plan, assembled
from deltakeeper.service.web import page as web_page
from deltakeeper.service.web.page import FILES, HEADERS

CHROMIUM = shutil.which("chromium")
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>\u202e"
LOADING = {"src", "href", "action", "formaction", "data", "poster", "srcset"}


class Tags(HTMLParser):
    """All tags of a page with their attributes, and the text inside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inline = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def live(service_folder, tmp_path_factory):
    """A whole service under a policy that lets `signs` in and keeps `ranks` out; keys by role are in `live.keys`."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(service_folder / "deltas", folder / "deltas")
    (folder / "policy.yaml").write_text("codecs: [bitdelta]\n")
    plan = Plan(folder / "deltas", folder / "state.db", folder / "log", "base", policy=folder / "policy.yaml")
    with assembled(open_base(service_folder / "base"), plan) as service:
        gate = service.services.gate
        service.services.store.register("signs-coarse", folder / "deltas" / "signs", planes=1)
        with served(service.services, app=service.app) as live:
            live.keys = {
                "admin": gate.keys.create("first", "admin").secret,
                "tenant": gate.keys.create("second", "tenant", ["signs"]).secret,
            }
            gate.refresh()
            with live.client(live.keys["admin"]) as client:
                for name in ("signs", "ranks"):
                    client.post("/v1/completions", json={"model": name, "prompt": PROMPT, "max_tokens": 3})
            yield live


def test_every_file_is_there_for_everybody_under_a_strict_policy(live):
    with live.client() as client:
        for path, name in FILES.items():
            answer = client.get(path)
            assert answer.status_code == 200 and answer.content
            assert answer.content == resources.files("deltakeeper.service.web").joinpath(name).read_bytes()
            assert all(answer.headers[key] == value for key, value in HEADERS.items())
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/web/page.js").headers["content-type"].startswith("text/javascript")
        for path in ("/web/", "/web/page.py", "/web/..%2fpage.py", "/web/__init__.py", "/index.html"):
            assert client.get(path).status_code == 404
    policy = dict(part.split(" ", 1) for part in HEADERS["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert policy["require-trusted-types-for"] == "'script'"


def test_the_files_load_nothing_from_elsewhere_and_hold_no_inline_script():
    texts = {
        path: resources.files("deltakeeper.service.web").joinpath(name).read_text() for path, name in FILES.items()
    }
    for path, text in texts.items():
        assert not re.search(
            r"(https?:)?//(?!www\.w3\.org/2000/svg)\w", re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.M)
        )
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage|@import|url\(", text
        )
        for module in re.findall(r"\bfrom \"(.*?)\"", text):
            assert f"/web/{module.removeprefix('./')}" in FILES, path
    page = Tags(texts["/"])
    assert not page.inline
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        for name in LOADING & set(attributes):
            assert attributes[name].startswith("#") or f"/{attributes[name]}" in FILES
    key = next(attributes for tag, attributes in page.tags if attributes.get("id") == "key")
    assert "name" not in key and key["type"] == "password"  # a form that is sent without its script has no key in it


def test_the_package_holds_every_file():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["deltakeeper"]
    assert all(any(Path("service/web", name).match(pattern) for pattern in patterns) for name in FILES.values())


def test_the_status_is_for_administrators_and_counts_what_was_answered(live):
    with live.client() as anybody, live.client(live.keys["tenant"]) as tenant, live.client(live.keys["admin"]) as admin:
        assert anybody.get("/admin/status").status_code == 401
        assert tenant.get("/admin/status").status_code == 403
        before = admin.get("/admin/status").json()
        asked = {"model": "signs", "prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}
        assert admin.post("/v1/completions", json=asked).status_code == 200
        after = admin.get("/admin/status").json()
    assert after["engine"]["answer_tokens"] - before["engine"]["answer_tokens"] == 5
    assert (after["base"], after["ready"], after["policy"], after["open"]) == ("base", True, True, False)
    assert after["deltas"]["resident_bytes"] > 0 and "tenants" not in after["deltas"]
    assert after["fidelities"] == [[{"id": "signs-coarse", "planes": 1}, {"id": "signs", "planes": None}]]


def test_names_that_were_put_for_one_artifact_are_its_fidelities(service_folder, tmp_path):
    shutil.copytree(service_folder, tmp_path, dirs_exist_ok=True)
    with (
        opened_services(tmp_path) as services,
        served(services, [status.router, deltas.router]) as live,
        live.client() as client,
    ):
        put = client.put("/admin/deltas/signs-coarse", json={"path": "signs", "planes": 1})
        assert put.status_code == 201, put.text
        found = client.get("/admin/status").json()["fidelities"]
        assert found == [[{"id": "signs-coarse", "planes": 1}, {"id": "signs", "planes": None}]]
        link = tmp_path / "deltas" / "signs-coarse"
        link.unlink()
        link.symlink_to(link)  # leads nowhere
        assert client.get("/admin/status").json()["fidelities"] == []


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, live):
    """Opens the page in a window of a size; what it asked for and complained of is kept on it."""
    contexts = []

    def open_page(width=1280, height=900, url=live.url, **settings):
        context = browser.new_context(viewport={"width": width, "height": height}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("console", lambda line: page.complaints.append(line.text) if line.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()


def give_key(page, key):
    """By keyboard alone."""
    page.locator("#key-form").wait_for()
    page.locator("#key").focus()
    page.keyboard.type(key)
    page.keyboard.press("Enter")
    page.locator("#playground").wait_for()


def check_silence(page):
    """Nothing went wrong but that there was no key at first or that it may not manage."""
    assert [line for line in page.complaints if "401" not in line and "403" not in line] == []


def test_an_administrator_sees_tenants_decisions_and_two_answers_at_once(visit, live):
    page = visit()
    assert not page.locator("#playground").is_visible() and not page.locator("#tenants").is_visible()
    give_key(page, live.keys["admin"])
    page.locator("#tenant-rows tr").nth(2).wait_for()
    rows = {row.split()[0]: row for row in page.locator("#tenant-rows tr").all_inner_texts()}
    assert "resident" in rows["signs"] and "admitted" in rows["signs"] and "KiB" in rows["signs"]
    assert "refused" in rows["ranks"] and "none" in rows["ranks"]
    reasons = page.locator("#decision-rows tr", has_text="ranks").inner_text()
    assert "refused" in reasons and "svd" in reasons
    assert page.locator("#facts dt").count() == 8

    assert [page.locator(f"#{side}-model").input_value() for side in ("first", "second")] == ["base", "signs"]
    page.locator("#prompt").fill(PROMPT)
    page.locator("#longest").fill("6")
    page.locator("#prompt").press("Control+Enter")
    for side in ("first", "second"):
        page.locator(f"#{side}-facts", has_text=re.compile(r"\d tokens?.*(reached|itself)\.")).wait_for()
        assert re.search(r"w\d", page.locator(f"#{side}-answer").inner_text())
        assert page.locator(f"#{side}-answer").get_attribute("aria-busy") == "false"
    assert page.locator("#said").inner_text() in ("base has answered.", "signs has answered.")
    asked = [request for request in page.asked if request.method == "POST"]
    assert sorted(request.post_data_json["model"] for request in asked) == ["base", "signs"]

    page.locator("#most", has_text=re.compile(r"[1-9]")).wait_for()

    assert page.locator("#planes-said").inner_text() == "all planes"
    page.locator("#planes").press("ArrowLeft")
    assert page.locator("#planes-said").inner_text() == "1 plane"
    assert page.locator("#second-model").input_value() == "signs-coarse"
    check_silence(page)


def test_the_key_is_sent_in_its_header_and_kept_nowhere(visit, live):
    page = visit()
    key = live.keys["admin"]
    give_key(page, key)
    page.locator("#tenant-rows tr").first.wait_for()
    assert all(key not in request.url and request.url.startswith(live.url) for request in page.asked)
    managing = [request for request in page.asked if "/admin/" in request.url]
    assert {request.headers["authorization"] for request in managing} == {f"Bearer {key}"}
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    assert page.locator("#key").input_value() == "" and key not in page.content() and key not in page.url
    page.locator("#forget").press("Enter")
    page.locator("#playground").wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "key"  # a reader is not left where nothing is
    assert not page.locator("#tenants").is_visible()


def test_a_tenants_key_shows_its_models_alone(visit, live):
    page = visit()
    give_key(page, live.keys["tenant"])
    assert page.locator("#first-model option").all_inner_texts() == ["signs"]
    assert not any(page.locator(f"#{part}").is_visible() for part in ("throughput", "tenants", "decisions"))
    assert "admin keys" in page.locator("#notice").inner_text()
    check_silence(page)


def test_what_a_model_says_is_text_and_an_error_is_told(visit, live):
    page = visit()
    give_key(page, live.keys["admin"])
    events = f'data: {{"choices": [{{"delta": {{"content": {MARKUP!r}}}, "finish_reason": "stop"}}]}}\n\n'.replace(
        "'", '"'
    )
    broken = 'data: {"error": {"message": "<b>It</b> broke off."}}\n\n'

    def answer(route):
        body = events + "data: [DONE]\n\n" if route.request.post_data_json["model"] == "base" else broken
        route.fulfill(status=200, headers={"Content-Type": "text/event-stream"}, body=body)

    page.route("**/v1/chat/completions", answer)
    page.locator("#prompt").fill("x")
    page.get_by_role("button", name="Ask both").click()
    page.locator("#first-facts", has_text="it ended by itself").wait_for()
    assert page.locator("#first-answer").inner_text() == MARKUP.replace("\u202e", "\ufffd")
    page.locator("#second-answer .failed").wait_for()
    assert page.locator("#second-answer").inner_text() == "<b>It</b> broke off."
    assert page.locator(".answer img, .answer script, .answer b").count() == 0
    with pytest.raises(Exception, match="TrustedHTML"):  # the browser holds the page to it
        page.evaluate("document.body.innerHTML = '<b>markup</b>'")


def test_answers_can_be_stopped(visit, live):
    page = visit()
    give_key(page, live.keys["admin"])
    page.route("**/v1/completions", lambda route: None)  # nothing ever comes
    page.locator("#way").select_option("text")
    page.locator("#prompt").fill("x")
    page.locator("#prompt").press("Control+Enter")
    page.locator("#second-answer[aria-busy=true]").wait_for()
    page.locator("#stop").press("Enter")
    for side in ("first", "second"):
        page.locator(f"#{side}-facts", has_text="stopped").wait_for()
    asked = [request.post_data_json for request in page.asked if request.method == "POST"]
    assert [(one["prompt"], one["stream"]) for one in asked] == [("x", True)] * 2


def test_a_reason_with_a_long_path_stays_in_its_column(visit, live):
    page = visit(390, 844)
    give_key(page, live.keys["admin"])
    reason = page.locator("#decision-rows td.reasons", has_text="svd")
    reason.wait_for()
    path = "/srv/" + "_".join(["deltas"] * 20)
    wide = reason.evaluate("(cell, path) => { cell.firstChild.append(` ${path}`); return cell.offsetWidth; }", path)
    assert wide <= 16 * 16 + 20  # its least width and the gap to the next column


def test_without_keys_everything_is_there_at_once_and_the_page_says_so(visit, service_folder):
    routers = [web_page.router, status.router, deltas.router, decisions.router]
    with opened_services(service_folder) as services, served(services, routers) as unlocked:
        shown = visit(url=unlocked.url)
        shown.locator("#tenant-rows tr").nth(1).wait_for()
        assert "No key was made yet" in shown.locator("#notice").inner_text()
        assert not shown.locator("#key-form").is_visible() and not shown.locator("#forget").is_visible()
        assert "no policy" in shown.locator("#no-decisions").inner_text()
        assert not shown.locator("#fidelity").is_visible()
        services.drain.begin()
        shown.locator("#notice", has_text="is stopping").wait_for()
        check_silence(shown)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(visit, live, scheme):
    page = visit(390, 844, color_scheme=scheme)
    give_key(page, live.keys["admin"])
    page.locator("#tenant-rows tr").nth(2).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) > 600) == (scheme == "light")
    unnamed = "input:not([type=hidden]), select, textarea"
    labels = page.evaluate(f"[...document.querySelectorAll('{unnamed}')].map((one) => one.labels.length)")
    assert labels and all(labels)
