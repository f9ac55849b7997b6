"""The search page's addresses, and the page itself in a real browser."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch
from browser_page import BROWSER, needs_browser
from published_layouts import EVA, random_model
from small_videos import write_video

from lightning_modules.checkpoints.conversion import LoadedModel, load_model
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.inference.embedding import EmbedOptions
from lightning_modules.inference.search import open_folder

pytest.importorskip("starlette")
from lightning_modules.inference.serve import SearchSite


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> SearchSite:
    """Two models over three videos, one in a folder with an awkward name."""
    folder = tmp_path_factory.mktemp("library")
    write_video(folder / "v" / "kitchen.mp4", 60)
    write_video(folder / "v" / "garden.mp4", 20, first=20)
    write_video(folder / "v" / "a <b> & 'c'" / "x.mp4", 20, first=40)
    (folder / "secret.txt").write_text("not a video of the index")
    (folder / "m.json").write_text(config_to_json(EVA))
    searches = []
    for seed in (1, 2):
        path = folder / f"m{seed}.pt"
        torch.save(random_model(EVA, seed).state_dict(), path)
        loaded: LoadedModel = load_model(path, config=folder / "m.json")
        searches.append(open_folder(folder / "v", loaded, EmbedOptions(rate=0.5)))
    return SearchSite(searches)


@pytest.fixture
def client(site: SearchSite):
    from starlette.testclient import TestClient

    with TestClient(site.app("127.0.0.1"), base_url="http://127.0.0.1") as client:
        yield client


def test_a_question_is_answered_by_every_model(client, site: SearchSite) -> None:
    answer = client.get("/ask", params={"q": "opens the fridge", "top": 3}).json()
    assert [len(model["hits"]) for model in answer["models"]] == [3, 3]
    for model, search in zip(answer["models"], site.searches, strict=True):
        (wanted,) = search.ask(["opens the fridge"], 3)
        assert [hit["score"] for hit in model["hits"]] == [hit.score for hit in wanted.hits]
        assert [hit["sure"] for hit in model["hits"]] == list(wanted.sure)
        assert all(site.videos[hit["number"]] == hit["video"] for hit in model["hits"])


def test_filters_keep_what_is_meant(client) -> None:
    for words, holds in [
        ({"video": "KITCH"}, lambda hit: hit["video"] == "kitchen.mp4"),
        ({"from": "3"}, lambda hit: hit["end_s"] > 3),
        ({"to": "1"}, lambda hit: hit["start_s"] < 1),
        ({"video": "x", "from": "0.5", "to": "1"}, lambda hit: hit["video"].endswith("x.mp4")),
    ]:
        hits = client.get("/ask", params={"q": "a", **words}).json()["models"][0]["hits"]
        assert hits and all(map(holds, hits)), words
    assert client.get("/ask", params={"q": "a", "video": "zzz"}).json()["models"][0]["hits"] == []


@pytest.mark.parametrize(
    "words", [{}, {"q": " "}, {"q": "a", "top": "0"}, {"q": "a", "top": "x"}, {"q": "a", "to": "y"}]
)
def test_a_wrong_question_is_refused(client, words) -> None:
    response = client.get("/ask", params=words)
    assert response.status_code == 400 and len(response.text) < 200


def test_videos_come_in_parts_and_frames_as_pictures(client, site: SearchSite) -> None:
    number = site.number["kitchen.mp4"]
    whole = (site.folder / "kitchen.mp4").read_bytes()
    part = client.get(f"/video/{number}", headers={"Range": "bytes=10-29"})
    assert part.status_code == 206 and part.content == whole[10:30]
    assert part.headers["content-type"] == "video/mp4"
    picture = client.get(f"/frame/{number}/1.00.jpg")
    assert picture.content[:3] == b"\xff\xd8\xff"
    assert client.get(f"/frame/{number}/999.00.jpg").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/video/99", "/video/-1", "/video/../secret.txt", "/video/..%2fsecret.txt", "/site/serve.py",
     "/site/..%2f..%2fserve.py", "/secret.txt"],
)  # fmt: skip
def test_nothing_but_the_index_is_served(client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404 and "not a video" not in response.text


def test_from_elsewhere_it_takes_the_token_and_the_right_name(site: SearchSite) -> None:
    from starlette.testclient import TestClient

    guarded = SearchSite(site.searches, token="right")
    app = guarded.app("192.0.2.7")
    client = TestClient(app, base_url="http://192.0.2.7")
    for path in ("/", "/ask?q=a", "/video/0", "/frame/0/0.00.jpg", "/?token=wrong"):
        assert client.get(path).status_code == 403, path
    assert client.get("/?token=right").status_code == 200
    assert client.get("/ask?q=a").status_code == 200  # by the cookie
    other = TestClient(app, base_url="http://evil.example")
    assert other.get("/?token=right").status_code == 400


def test_mistakes_are_one_line(site: SearchSite, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--videos", str(site.folder), "--checkpoint", "m.pt"]
    for more, message in [
        (["--serve", "a question"], "--serve is asked in the browser"),
        (["q", "--html", "x.html", "--checkpoint", "other.pt"], "shows one model"),
    ]:
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture
def address(site: SearchSite):
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(site.app("127.0.0.1"), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def page(address: str):
    """A browser's page that notes errors and requests to elsewhere."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)  # a busy machine decodes the pictures slowly
        problems: list[str] = []
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((address, "data:")) else problems.append(r.url),
        )
        yield page
        browser.close()
        assert problems == []


def answered(page) -> None:
    """Wait for an answer; the failure says what the page says."""
    from playwright.sync_api import expect

    expect(page.locator("#status")).to_contain_text("moments for", timeout=120_000)


@needs_browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_typing_playing_and_the_keyboard(page, address: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("#q:focus")  # comes by itself, some time after the page
    page.keyboard.type("opens the fridge")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator("section").count() == 2
    assert "moments for “opens the fridge”" in page.inner_text("#status")
    name = "a <b> & 'c'/x.mp4"
    assert name in page.locator(".about b").all_inner_texts()  # as text, not as markup
    # the first answer plays from its moment
    video = page.locator("video").first
    start = float(video.get_attribute("src").split("#t=")[1].split(",")[0])
    video.evaluate("v => v.play()")
    page.wait_for_function("() => document.querySelector('video').currentTime > 0")
    assert video.evaluate("v => v.currentTime") >= start
    # a filter, by the keyboard alone
    page.focus("#q")
    page.keyboard.press("Tab")
    page.keyboard.type("garden")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "() => [...document.querySelectorAll('.about b')].every(b => b.textContent == 'garden.mp4')"
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # the address holds the question: it can be kept and sent on
    page.reload()
    answered(page)
    assert page.input_value("#q") == "opens the fridge"
    found = Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()
