"""The interactive page: in a real browser, with no network, at several sizes; and the arrays."""

import html
import json
import os
import shutil
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_maps import OPTIONS, picture, run  # noqa: F401 (a fixture is an argument here)

from ea_maps import page as pages
from ea_maps.image import look
from ea_maps.view import ImageView, SeriesView, TokenView
from evolving_attention import AttentionMap

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SIZES = ((390, 844), (820, 1180), (1440, 900))
SOURCE = ["zwei", "</script><b>x", "im", "frei@@", "en", "日本", "</s>"]
TARGET = ["</s>", "two", "$a_b$", "out@@", "side"]


def maps(layers, heads, queries, keys, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(layers):
        logits = 2 * torch.randn(1, heads, queries, keys, generator=generator)
        found.append(AttentionMap(f"layers.{number}.attn", logits, logits.softmax(-1)))
    return found


def both(*shape, seed=0):
    return {"evolving": maps(*shape, seed=seed), "plain": maps(*shape, seed=seed + 1)}


def sentence_views():
    return [
        TokenView(both(4, 3, 7, 7), SOURCE, SOURCE, attention="encoder"),
        TokenView(both(2, 3, 5, 7, seed=7), TARGET, SOURCE, attention="encoder-decoder"),
    ]


def write(path, views, title="checkpoint.pt: <i>a sentence</i>"):
    path.write_text(pages.as_page(views, title), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """Chromium without a head; with REQUIRE_BROWSER in the environment it must be there."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        missing = "no Chromium or Chrome is installed (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox does not work for root, as in many containers.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser):
    """show(path, size): the page in the browser; at the end, there were no errors or requests."""
    opened = []

    def open_page(path, size=SIZES[-1]):
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.on("requestfailed", lambda request: problems.append(request.url))
        urls = []
        page.on("request", lambda request: urls.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelector('.top')?.textContent")
        opened.append((page, problems, urls, path.as_uri()))
        return page

    yield open_page
    for page, problems, urls, own in opened:
        assert problems == []
        assert [url for url in urls if not url.startswith("data:")] == [own]
        page.close()


def shaded(page, panel):
    """The probabilities with which a panel's keys are shaded."""
    keys = page.locator(".panel").nth(panel).locator(".tokens span").all()
    return [float(key.get_attribute("data-p")) for key in keys]


def assert_shows(page, view, layer, head, query):
    """Both panels shade the keys by these maps."""
    for panel, found in enumerate(view.maps.values()):
        probs = found[min(layer, len(found) - 1)].attn_probs[0]
        probs = probs.mean(0) if head is None else probs[head]
        page.wait_for_function(
            "([panel, p]) => Math.abs(document.querySelectorAll('.panel')[panel]"
            ".querySelector('.tokens span').dataset.p - p) < 0.006",
            arg=[panel, probs[query, 0].item()],
            timeout=5000,
        )
        np.testing.assert_allclose(shaded(page, panel), probs[query], atol=0.006)


def test_choose_hover_step_and_compare(tmp_path, show):
    views = sentence_views()
    page = show(write(tmp_path / "maps.html", views))
    assert page.locator("h1").text_content() == "checkpoint.pt: <i>a sentence</i>"
    assert page.locator(".panel h2").all_text_contents() == ["evolving", "plain"]
    assert page.locator("#queries .tokens span").all_text_contents() == SOURCE
    assert_shows(page, views[0], 0, None, 0)

    page.locator("#queries .tokens span").nth(3).hover()
    assert_shows(page, views[0], 0, None, 3)
    assert "“frei@@” looks at “" in page.locator(".top").first.text_content()
    page.locator("#next").click()
    page.locator("#next").click()
    assert_shows(page, views[0], 2, None, 3)
    assert page.locator("#layer-text").text_content() == "3 of 4"
    assert "layers.2.attn" in page.locator(".where").first.text_content()
    page.select_option("#head", label="2")
    assert_shows(page, views[0], 2, 1, 3)
    page.locator(".film").nth(1).locator("button").nth(3).click()
    assert_shows(page, views[0], 3, 1, 3)
    page.locator(".curves svg").nth(0).locator(".point").nth(1).click()  # of the second layer
    assert_shows(page, views[0], 1, 1, 3)

    box = page.locator(".map canvas").first.bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + box["height"] * 5.5 / 7)
    assert_shows(page, views[0], 1, 1, 5)
    probability = views[0].maps["evolving"][1].attn_probs[0, 1, 5, 3].item()
    (shown,) = page.locator(".scale").first.evaluate_all("x => x.map(y => y.textContent)")
    assert shown.startswith("Rows: queries.") and "Here, “frei@@”: " in shown
    assert abs(float(shown.rpartition(": ")[2].removesuffix("\u00a0%.")) - 100 * probability) < 1

    page.select_option("#attention", label="encoder-decoder")
    assert page.locator("#queries .tokens span").all_text_contents() == TARGET
    assert_shows(page, views[1], 1, None, 4)


def test_rollout_is_one_more_view(tmp_path, show):
    encoder, cross = sentence_views()
    rolled = encoder.shown_as("rollout")
    page = show(write(tmp_path / "maps.html", [encoder, rolled, cross]))
    page.select_option("#head", label="3")
    page.select_option("#attention", label="encoder, rollout")
    page.locator("#next").click()
    page.locator("#queries .tokens span").nth(2).hover()
    assert_shows(page, rolled, 1, 0, 2)
    assert page.locator("#head option").all_text_contents() == ["1"]
    page.select_option("#attention", label="encoder-decoder")
    assert_shows(page, cross, 1, None, 2)


def test_the_keyboard_alone_is_enough(tmp_path, show):
    views = sentence_views()
    page = show(write(tmp_path / "maps.html", views))
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert_shows(page, views[0], 1, None, 1)
    for key in ("]", "]", "["):
        page.keyboard.press(key)
    assert_shows(page, views[0], 1, 0, 1)
    page.keyboard.press("p")
    page.wait_for_function("document.getElementById('layer-text').textContent === '3 of 4'")
    page.keyboard.press("p")
    assert page.locator("#play").get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nothing_is_cut_off_at_any_size(tmp_path, show, size):
    series = np.sin(np.arange(90).reshape(1, 90) / 9) * np.ones((3, 1))
    views = [*sentence_views(), SeriesView(both(3, 2, 90, 90), series, attention="steps")]
    page = show(write(tmp_path / "maps.html", views), size)
    for attention in ("encoder", "steps"):
        page.select_option("#attention", label=attention)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for canvas in page.locator(".map canvas, .picture canvas").all():
            assert canvas.bounding_box()["width"] > 150
    box = page.locator(".picture canvas").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9)
    page.wait_for_function("document.querySelector('.top').textContent.startsWith('Step 45 ')")


def test_an_image_beside_a_plain_model(tmp_path, show, picture, capsys):  # noqa: F811
    out = tmp_path / "maps.html"
    arguments = ["image", "ea_vit_tiny", picture, *OPTIONS, "--compare", "vit_tiny_patch16_224"]
    run(*arguments, "--out", out)
    assert "self-attention, plain" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.html", "picture.png"]
    page = show(out)
    page.wait_for_function("data.views[0].models.every(model => model.pixels.complete)")
    assert page.locator(".top").first.text_content().startswith("The class token looks at ")
    canvas = page.locator(".picture canvas").nth(1)
    box = canvas.bounding_box()
    before = canvas.evaluate("x => x.toDataURL()")
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.9)
    for panel in range(2):
        page.wait_for_function(
            "i => document.querySelectorAll('.top')[i].textContent.startsWith('Row 4, column 3 ')",
            arg=panel,
        )
    assert canvas.evaluate("x => x.toDataURL()") != before
    page.get_by_text("mean of the whole image").click()
    page.wait_for_function("document.querySelector('.top').textContent.startsWith('The whole')")


def test_an_image_beside_a_model_with_more_special_tokens(tmp_path, show, picture):  # noqa: F811
    out = tmp_path / "maps.html"
    run(
        "image",
        "ea_vit_tiny",
        picture,
        *OPTIONS,
        "--compare",
        "ea_deit_tiny_distilled",
        "--out",
        out,
    )
    page = show(out)
    page.wait_for_function("data.views[0].models.every(model => model.pixels.complete)")

    def wait_for(*starts):
        for panel, start in enumerate(starts):
            page.wait_for_function(
                "([i, x]) => document.querySelectorAll('.top')[i].textContent.startsWith(x)",
                arg=[panel, start],
            )

    wait_for("The class token looks at", "The class token looks at")
    page.get_by_text("token 2 before the image", exact=True).click()
    wait_for("The whole image looks at", "The token 2 before the image looks at")
    page.keyboard.press("ArrowRight")
    wait_for("Row 1, column 1 looks at", "Row 1, column 1 looks at")
    page.keyboard.press("Shift+ArrowRight")
    wait_for("Row 2, column 1 looks at", "Row 2, column 1 looks at")
    canvas = page.locator(".map canvas").first
    height = canvas.bounding_box()["height"]
    canvas.click(position={"x": 2, "y": 5.5 / 17 * height})  # the class token, a row, one more
    wait_for("Row 2, column 1 looks at", "Row 2, column 1 looks at")
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    wait_for("Row 4, column 4 looks at", "Row 4, column 4 looks at")


def test_a_resnet_whose_maps_change_their_size(tmp_path, show, picture):  # noqa: F811
    run("image", "ea_resnet50", picture, "--option", "img_size=64", "--out", tmp_path / "m.html")
    page = show(tmp_path / "m.html")
    assert page.locator(".top").first.text_content().startswith("The whole image looks at ")
    page.keyboard.press("ArrowRight")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    page.wait_for_function("document.querySelector('.where').textContent.includes('layer4.2')")
    assert page.locator(".top").first.text_content().startswith("Row 1, column 1 looks at ")


@pytest.mark.slow
def test_a_long_sentence_in_a_deep_model_stays_usable(tmp_path, show):
    words = [f"word{number}" for number in range(600)]
    (one,) = maps(1, 4, 600, 600)
    view = TokenView({"evolving": [one] * 24}, words, words)
    path = write(tmp_path / "maps.html", [view])
    assert path.stat().st_size < 6_000_000
    page = show(path)
    assert "neighbours share a cell" in page.locator("#note").text_content()
    for key in ("ArrowDown", "ArrowRight", "ArrowDown", "]"):
        page.keyboard.press(key)
    page.locator("#queries .tokens span").nth(31).hover()
    page.wait_for_function(
        "document.querySelector('.top').textContent.startsWith('“word31”')"
        "&& document.getElementById('layer-text').textContent === '3 of 24'",
        timeout=5000,
    )
    assert sum(shaded(page, 0)) > 0.9  # the keys that share a cell have its sum
    # What is chosen, or looked at most, is scrolled into sight.
    for key in ("Shift+ArrowRight", "ArrowDown"):
        for _ in range(20):
            page.keyboard.press(key)
    page.wait_for_function("document.getElementById('layer-text').textContent === '23 of 24'")
    for node in ("#queries .chosen", ".film [aria-current=true]"):
        page.wait_for_function(
            "node => { const x = document.querySelector(node).getBoundingClientRect();"
            "const box = document.querySelector(node).parentElement.getBoundingClientRect();"
            "return x.top > box.top - 1 && x.bottom < box.bottom + 1"
            " && x.left > box.left - 1 && x.right < box.right + 1; }",
            arg=node,
        )
    assert page.locator("#queries .chosen").text_content() == "word231"


def data_of(page):
    """What the page shows, as Python's objects."""
    start = page.index('{"title"')
    return json.JSONDecoder().raw_decode(page[start:])[0]


def test_each_model_has_heads_of_its_own(tmp_path, show):
    """The menu has one list of heads; the panels say which of theirs they show."""
    views = [TokenView({"a": maps(2, 3, 4, 4), "b": maps(2, 12, 4, 4)}, "abcd", "abcd")]
    path = tmp_path / "maps.html"
    path.write_text(pages.as_page(views, most_heads=3), encoding="utf-8")
    page = show(path)
    for chosen, expected in (("2", ("head 2", "head 7")), ("3", ("head 3", "head 12"))):
        page.select_option("#head", label=chosen)
        for panel, head in enumerate(expected):
            page.locator(".panel .where", has_text=f", {head}:").nth(0).wait_for(timeout=5000)
            assert f", {head}:" in page.locator(".panel .where").nth(panel).text_content()
    page.select_option("#head", label="mean of all")
    page.locator(".panel .where", has_text="layer 1 of 2: layers.0").nth(1).wait_for(timeout=5000)


def test_layers_keep_their_numbers_if_some_are_left_out(tmp_path, show):
    for depth, place, axis in ((12, "7 of 12", ["1", "7", "12"]), (3, "2 of 3", ["1", "2", "3"])):
        both = {"a": maps(12, 2, 4, 4), "b": maps(depth, 2, 4, 4)}
        path = tmp_path / f"maps{depth}.html"
        page = pages.as_page([TokenView(both, "abcd", "abcd")], most_layers=3)
        path.write_text(page, encoding="utf-8")
        page = show(path)
        page.locator("#next").click()
        page.locator(".panel .where", has_text="layer 7 of 12").first.wait_for(timeout=5000)
        second = f"layer {2 if depth == 3 else 7} of {depth}"
        page.locator(".panel .where", has_text=second).last.wait_for(timeout=5000)
        assert page.locator("#layer-text").text_content() == place
        assert page.locator(".film").first.text_content() == "1712"
        curve = page.locator(".curves svg").first
        found = [text for text in curve.locator("text").all_text_contents() if text.isdigit()]
        assert found == axis
        titles = [title.partition(":")[0] for title in curve.locator("title").all_text_contents()]
        assert titles[:3] == ["a, layer 1", "a, layer 7", "a, layer 12"]


def test_a_series_with_gaps(tmp_path, show):
    series = np.array([[0.0, np.nan, 2.0, 4.0], [np.nan] * 4])
    views = [SeriesView({"mine": maps(2, 2, 4, 4)}, series)]
    assert data_of(pages.as_page(views))["views"][0]["series"] == [[0, None, 0.5, 1], [None] * 4]
    show(write(tmp_path / "maps.html", views))


@pytest.mark.parametrize("series", [np.zeros((2, 3)), np.zeros(4)])
def test_a_series_of_other_steps_than_the_maps_is_refused(series):
    with pytest.raises(ValueError, match=r"series must be \(channels, 4\), .* got shape"):
        SeriesView({"mine": maps(1, 1, 4, 4)}, series)


def test_a_page_of_no_view_is_refused():
    with pytest.raises(ValueError, match="views must hold at least one view"):
        pages.as_page([])


def test_curves_are_those_of_the_maps_in_view(tmp_path, picture):  # noqa: F811
    """Also on the command line: rollout is more even than what the heads see."""
    out = tmp_path / "maps.html"
    run("image", "ea_vit_tiny", picture, *OPTIONS, "--show", "heads", "rollout", "--out", out)
    heads, rollout = data_of(out.read_text(encoding="utf-8"))["views"]
    (first,), (second,) = heads["models"], rollout["models"]
    assert first["entropy"] != second["entropy"]


def test_a_title_and_tokens_that_look_like_the_template():
    odd = "/*DATA*/</script><title></title>&amp;"
    page = pages.as_page([TokenView({"mine": maps(1, 1, 2, 2)}, [odd, "b"], [odd, "b"])], odd)
    assert page.count(f"<title>{html.escape(odd)}</title>") == 1
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["title"] == odd
    assert json.loads(data)["views"][0]["keys"] == [odd, "b"]


@pytest.mark.parametrize("count", [1, 3, 4, 50])
def test_neighbours_share_a_cell(count):
    probs = maps(1, 2, 9, 14)[0].attn_probs[0]
    rows = [part.mean(1) for part in probs.split(count, dim=1)]
    expected = [torch.stack(rows, 1)[..., i : i + count].sum(-1) for i in range(0, 14, count)]
    torch.testing.assert_close(pages.shared(probs, count), torch.stack(expected, -1))


@pytest.mark.parametrize("keys", [2, 197, 3000])
def test_packed_probabilities(keys):
    probs = maps(1, 2, 5, keys)[0].attn_probs[0]
    packed, most = pages.pack(probs)
    cells = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(probs.shape)
    assert most == probs.max()
    np.testing.assert_allclose(most * (cells / 255) ** 2, probs, atol=most / 250)


def test_heads_are_left_out_of_a_large_page(monkeypatch):
    view = TokenView({"evolving": maps(3, 8, 7, 7)}, SOURCE, SOURCE)
    monkeypatch.setattr(type(view), "kind", "image")
    heads = {"evolving": list(range(8))}
    layers, shared = pages.pack_view(view, heads, limit=600)
    assert shared == 1 and 0 < len(heads["evolving"]) < 8
    assert sum(len(layer["data"]) for layer in layers["evolving"]) <= 600
    assert layers["evolving"][0]["shape"] == [len(heads["evolving"]), 7, 7]
    monkeypatch.setattr(pages, "CELLS", 3 * 7 * 7 - 1)  # not even one head fits
    layers, _ = pages.pack_view(view, heads, limit=600)
    assert [layer["shape"] for layer in layers["evolving"]] == [[1, 7, 7]] * 3


def test_registers_are_not_class_tokens(picture):  # noqa: F811
    names = {}
    for options in ({}, {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}):
        model = timm.create_model("ea_vit_tiny", img_size=32, patch_size=8, depth=2, **options)
        view = ImageView.of({"mine": look(model.eval(), Image.open(picture))})
        names[len(options)] = view.about()["special"]
    assert names == {
        0: ["class token"],
        3: ["token 1 before the image", "token 2 before the image"],
    }


def test_arrays_for_other_programs(tmp_path, picture):  # noqa: F811
    out = tmp_path / "maps.npz"
    run("image", "ea_vit_tiny", picture, *OPTIONS, "--out", out)
    with np.load(out) as found:
        layers = [found[f"evolving/self-attention/{number:03d}"] for number in range(3)]
        assert list(found["self-attention/keys"]) == list(range(17))
    for probs in layers:
        assert probs.shape == (1, 3, 17, 17) and probs.dtype == np.float32
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    names = pages.arrays(sentence_views())
    assert list(names["encoder-decoder/queries"]) == TARGET
    assert names["plain/encoder-decoder/001"].shape == (1, 3, 5, 7)
