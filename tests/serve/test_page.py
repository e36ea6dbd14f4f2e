"""The page in headless Chromium: write, stop, undo, reload, both languages, errors; nothing leaves this machine."""

import importlib.util
import json
import re
import shutil
import time

import pytest
from test_server import POEM, POEM_SAMPLER, Served, tiny

from nanogpt.base import language as messages
from nanogpt.base.config import ROOT
from nanogpt.data.labels import with_labels
from nanogpt.data.tokenizer import ByteTokenizer
from nanogpt.write.loading import Settings

pytest.importorskip("selenium", reason="the page's tests need selenium: pip install -e .[dev]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="no Chromium with chromedriver: apt-get install chromium chromium-driver")

PAGE = ROOT / "nanogpt" / "serve" / "page" / "index.html"


def screenshot_program():
    spec = importlib.util.spec_from_file_location("screenshot", ROOT / "docs" / "screenshot.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Page:
    """One tab on a server."""

    def __init__(self, driver, port):
        self.driver, self.url = driver, f"http://127.0.0.1:{port}/"

    def open(self, *, forget=True):
        self.driver.get(self.url)
        if forget:
            self.driver.execute_script("removeEventListener('pagehide', keep); localStorage.clear(); sessionStorage.clear()")
            self.driver.get(self.url)
        self.until(lambda: self.all("seed") or self.shown("error"))
        return self

    def all(self, name):
        return self.driver.find_elements("id", name)

    def __getitem__(self, name):
        return self.driver.find_element("id", name)

    def shown(self, name):
        return self[name].is_displayed()

    @property
    def text(self):
        return self["text"].get_property("value")

    def options(self, name):
        return [option.text for option in self[name].find_elements("tag name", "option")]

    def names(self, part):
        return [option.text.strip() for option in part.find_elements("tag name", "option")]

    def choose(self, name, words):
        next(option for option in self[name].find_elements("tag name", "option") if option.text.strip() == words).click()

    def marked(self):
        return [mark.get_property("textContent") for mark in self["marks"].find_elements("tag name", "mark")]

    def turn(self, name, value):
        self[name].clear()
        self[name].send_keys(str(value))

    def until(self, condition, seconds=20):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.driver.get_log("browser")
            time.sleep(0.02)

    def write(self):
        self["write"].click()
        self.until(lambda: self["write"].is_enabled())

    def complaints(self):
        """What the browser's console says, recommendations aside."""
        return [entry for entry in self.driver.get_log("browser") if entry["level"] != "DEBUG"]

    def requested(self):
        """Addresses that were asked for since the last time."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    chromium = screenshot_program().browser(str(tmp_path_factory.mktemp("profile")), "--accept-lang=en-US", "--window-size=1280,800")
    yield chromium
    chromium.quit()


@pytest.fixture(scope="module")
def poet():
    messages.set_language("en")
    server = Served(tiny(ByteTokenizer()), sampler=POEM_SAMPLER, read_seconds=20)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def plain():
    server = Served(tiny(), read_seconds=20, max_prompt_chars=50)
    yield server
    server.stop()


@needs_chromium
def test_write_stop_undo_reload_and_change_the_language(driver, poet):
    from selenium.webdriver.common.keys import Keys

    page = Page(driver, poet.port).open()
    page.requested()
    assert page["write"].text == "Write" and "tiny" in page["model"].text and not page["undo"].is_enabled() and not page.shown("error")
    # 这个 sampler 没有温度，页面就不给这个旋钮；风格与情绪用界面的语言列出
    assert not page.all("temperature") and page["max_tokens"].get_property("value") == "20"
    assert page.shown("controls") and page.options("emotion")[:2] == ["none", "happy"]
    page.turn("max_tokens", 50_000)
    page["text"].send_keys("~|", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: len(page.text) > 6)
    assert page.text[2:] and POEM.startswith(page.text[2:12]) and page["stop"].is_enabled() and not page["write"].is_enabled()
    assert re.fullmatch(r"\d+ tokens · (\d+(\.\d)?|–) tokens/s · seed \d+", page["status"].text)
    before = len(page.text)
    page["language"].click()
    assert page["write"].text == "写作" and "种子" in page["status"].text and driver.execute_script("return document.documentElement.lang") == "zh-CN"
    assert page.options("emotion")[:2] == ["无", "开心"]
    # 查表与其余的参数分开说
    assert driver.execute_script("return counted({parameters: 17285376, table_parameters: 14100736})") == "3.2M + 查表 14.1M"
    page.until(lambda: len(page.text) > before)
    page["text"].send_keys(Keys.ESCAPE)
    page.until(lambda: page["write"].is_enabled())
    poet.until_texts(0)
    stopped = page.text
    page.turn("max_tokens", 12)
    page.write()
    assert page.text.startswith(stopped) and len(page.text) - len(stopped) in (4, 5)
    whole = page.text
    page.open(forget=False)
    assert page.text == whole and page["write"].text == "写作" and page["max_tokens"].get_property("value") == "12"
    page["undo"].click()
    assert page.text == stopped
    page["undo"].click()
    assert page.text == "~|" and not page["undo"].is_enabled()
    assert all(url.startswith((page.url, "data:")) for url in page.requested())
    assert page.complaints() == []


@needs_chromium
def test_the_dials_reach_the_sampler_and_undo_keeps_what_was_typed_later(driver, plain):
    page = Page(driver, plain.port).open()
    for name, value in (("temperature", 0), ("max_tokens", 15), ("seed", 3)):
        page.turn(name, value)
    page["text"].send_keys("the king")
    page.write()
    settings = Settings.of(plain.cfg)
    settings.sampler["temperature"], settings.max_new_tokens = 0, 15
    *_, last = plain.model.writer(capacity=1).write([settings.request("the king")])
    assert page.text == "the king" + last.result.text and page["status"].text.endswith("seed 3")
    page["text"].send_keys(" and more")
    page["undo"].click()
    assert page.text == "the king and more"
    page.turn("temperature", 200)
    page["write"].click()
    page.until(lambda: page.shown("error"))
    assert "Temperature" in page["error"].text and page.text == "the king and more"
    page["reset"].click()
    assert page["temperature"].get_property("value") == "0.8"
    # 太长的正文只送末尾
    page.turn("max_tokens", 3)
    page["text"].send_keys("a" * 60)
    page.write()
    assert len(page.text) == len("the king and more") + 63 and not page.shown("error")
    assert page.complaints() == []


@pytest.fixture(scope="module")
def labelled():
    tokenizer = with_labels(ByteTokenizer(), {"style": ["宋词"], "emotion": ["positive"]}, grow=True)
    server = Served(tiny(tokenizer), sampler=POEM_SAMPLER, read_seconds=20, max_texts=3)
    yield server
    server.stop()


@needs_chromium
def test_labels_and_wishes_stand_apart_and_what_the_model_does_not_know_says_so(driver, labelled):
    page = Page(driver, labelled.port).open()

    def groups(name):
        return {group.get_attribute("label"): page.names(group) for group in page[name].find_elements("tag name", "optgroup")}

    emotions = groups("emotion")
    assert emotions["Labels that it was trained with"] == ["positive"] and "sad" in emotions["Wishes, not trained"]
    # 开心、happy 是 positive 的别名，不是另一个愿望；一次只有一种语言
    assert not {"happy", "开心", "悲伤"} & {name for names in emotions.values() for name in names}
    page.choose("emotion", "positive")
    assert not page.shown("emotion-note")
    page.choose("emotion", "sad")
    assert "Not a label of this model" in page["emotion-note"].text
    page.choose("style", "own words …")
    for typed, known in (("充满诗意的", False), ("宋词", True)):
        page.turn("style-words", typed)
        assert page.shown("style-note") is not known
    page.turn("max_tokens", 3)
    page["text"].send_keys("|")
    page.write()
    assert not page.shown("error") and driver.execute_script("return asked().style") == "宋词"
    driver.get(page.url + "?lang=zh")
    page.until(lambda: page.all("seed"))
    assert list(groups("emotion")) == ["模型学过的标签", "愿望，没有训练过"] and "悲伤" in groups("emotion")["愿望，没有训练过"]
    page["language"].click()
    assert driver.current_url.endswith("?lang=en") and page["write"].text == "Write"
    assert page.complaints() == []


@needs_chromium
def test_several_samples_to_choose_from_and_what_the_model_wrote_is_tinted(driver, labelled):
    page = Page(driver, labelled.port).open()
    driver.execute_cdp_cmd("Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]})
    page.turn("max_tokens", 15)
    page.turn("n", 3)
    page["text"].send_keys("my own|")
    page.write()
    cards = page["samples"].find_elements("tag name", "article")
    assert page.text == "my own|" and [card.find_element("tag name", "p").text for card in cards] == [POEM[:5]] * 3
    page.open(forget=False)
    assert len(page["samples"].find_elements("tag name", "article")) == 3
    page["samples"].find_elements("tag name", "button")[2].click()
    assert page.text == "my own|" + POEM[:5] and page.marked() == [POEM[:5]] and not page.shown("samples")
    assert "5 of them by the model" in page["status"].text
    # 在模型写的中间插几个字：那几个字是人的
    driver.execute_script("text.setRangeText('XY', 9, 9, 'end'); text.dispatchEvent(new Event('input'))")
    assert page.text == "my own|春天XY的花朵" and page.marked() == ["春天", "的花朵"]
    page.open(forget=False)
    assert page.marked() == ["春天", "的花朵"]
    page["copy"].click()
    page.until(lambda: page["status"].text == "copied")
    assert driver.execute_async_script("navigator.clipboard.readText().then(arguments[0], error => arguments[0](String(error)))") == page.text
    driver.execute_script("HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, this.href] }")
    page["download"].click()
    assert driver.execute_script("return saved[0]") == "nanogpt.txt" and driver.execute_script("return saved[1]").startswith("blob:")
    assert page.complaints() == []


@needs_chromium
def test_undo_brings_the_other_samples_back_and_the_tint_lies_under_the_words(driver, labelled):
    page = Page(driver, labelled.port).open()
    page.turn("max_tokens", 9)
    page.turn("n", 2)
    page["text"].send_keys("\n" * 40 + "a|")
    page.write()
    page["samples"].find_elements("tag name", "button")[0].click()
    page["undo"].click()
    assert page.text.strip() == "a|" and page.marked() == [] and len(page["samples"].find_elements("tag name", "article")) == 2
    page.turn("n", 1)
    page.turn("max_tokens", 99)
    page.write()
    same = driver.execute_script("const [a, b] = [document.getElementById('text'), document.getElementById('marks')]; return [a.scrollHeight - b.scrollHeight, a.clientWidth - b.clientWidth, a.scrollTop - b.scrollTop]")
    assert len(page.text) > 60 and all(abs(difference) <= 2 for difference in same) and not page.shown("samples")


@needs_chromium
def test_errors_are_a_line_of_text_never_html_and_the_text_stays(driver, plain):
    page = Page(driver, plain.port).open()
    page["text"].send_keys("<img src=x>")
    page.write()
    page.until(lambda: page.shown("error"))
    assert "the vocabulary lacks '<'" in page["error"].text and page.text == "<img src=x>" and not driver.find_elements("tag name", "img")
    page["language"].click()
    page.write()
    assert "词表里没有 '<'" in page["error"].text
    driver.get_log("browser")


@needs_chromium
def test_the_page_asks_for_the_token(driver):
    server = Served(tiny(), token="a-long-token", read_seconds=20)
    try:
        page = Page(driver, server.port).open()
        assert page.shown("token-box") and page.shown("error") and not page.all("seed")
        page["token"].send_keys("a-wrong-token")
        page["use-token"].click()
        page.until(lambda: page.shown("error"))
        page["token"].send_keys("a-long-token\n")
        page.until(lambda: page.all("seed"))
        page["text"].send_keys("abc")
        page.write()
        assert len(page.text) > 3 and not page.shown("token-box") and not page.shown("error")
        driver.get_log("browser")
    finally:
        server.stop()
    page.write()
    assert "cannot be reached" in page["error"].text and page.text.startswith("abc")
    driver.get_log("browser")


@needs_chromium
def test_it_fits_a_phone(driver, plain):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": 360, "height": 700, "deviceScaleFactor": 1, "mobile": True})
    try:
        page = Page(driver, plain.port).open()
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
        assert page["write"].rect["y"] + page["write"].rect["height"] < 700 and not page["seed"].is_displayed()
        driver.find_element("tag name", "summary").click()
        page.until(lambda: page["seed"].is_displayed())
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
def test_every_input_has_a_name_for_those_who_listen(driver, plain):
    Page(driver, plain.port).open()
    unnamed = driver.execute_script("""return [...document.querySelectorAll("input, select, textarea, button")]
        .filter(e => !e.getAttribute("aria-hidden") && !(e.labels?.length && e.labels[0].textContent.trim()) && !e.textContent.trim()).map(e => e.id)""")
    assert unnamed == []


def test_both_languages_of_the_page_have_the_same_words():
    page = PAGE.read_text(encoding="utf-8")
    words = {}
    for language in ("en", "zh"):
        block = re.search(rf"^  {language}: \{{\n(.*?)^  \}},", page, flags=re.DOTALL | re.MULTILINE)[1]
        words[language] = dict(re.findall(r'(\w+): "([^"]*)"', block))
    assert words["en"].keys() == words["zh"].keys() and len(words["en"]) > 30
    for key, text in words["en"].items():
        assert set(re.findall(r"\{\w+\}", text)) == set(re.findall(r"\{\w+\}", words["zh"][key])), key
    used = set(re.findall(r'data-t="(\w+)"', page)) | set(re.findall(r'\bt\("(\w+)"', page))
    assert used <= words["en"].keys()
