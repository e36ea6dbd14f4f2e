"""Draw docs/page.png: python docs/screenshot.py OUT_DIR — serves that run, writes with it in headless Chromium, takes the picture.

Needs Chromium with its driver and `pip install selenium`. Options: --to FILE, --size 1280x960, --dark, --lang zh, --text PROMPT, --tokens N.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)


def browser(profile: str, *flags: str):
    """A headless Chromium with a profile folder of its own; it records its console and its requests."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    # 路径都给全：selenium 就不会去网上找浏览器
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def take(driver, url: str, *, prompt: str, tokens: int, to: Path) -> None:
    """Write behind a prompt and save what the page shows."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.get(url)
    WebDriverWait(driver, 30).until(lambda d: d.find_elements(By.ID, "seed"))
    opened = driver.find_element(By.ID, "panel").get_attribute("open")
    # 窄屏上旋钮收着，先摊开才点得到
    driver.execute_script("document.getElementById('panel').open = true")
    for name, value in (("max_tokens", tokens), ("seed", 7)):
        driver.find_element(By.ID, name).clear()
        driver.find_element(By.ID, name).send_keys(str(value))
    driver.execute_script("document.getElementById('panel').open = arguments[0]", bool(opened))
    driver.find_element(By.ID, "text").send_keys(prompt)
    driver.find_element(By.ID, "write").click()
    WebDriverWait(driver, 120).until(lambda d: d.find_element(By.ID, "undo").is_enabled())
    # 填旋钮时右栏滚下去了
    driver.execute_script("for (const part of document.querySelectorAll('aside, aside *')) part.scrollTop = 0")
    driver.save_screenshot(str(to))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir")
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "page.png")
    parser.add_argument("--size", default="1280x960")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--lang", default="en-US")
    parser.add_argument("--text", default="KING:\nThe night is long, and yet the morning")
    parser.add_argument("--tokens", type=int, default=420)
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "run_sample.py"), f"out_dir={args.out_dir}", "serve=true", "server.port=0", "lang=en"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    with tempfile.TemporaryDirectory() as profile:
        try:
            # 第一次用时，先有一行说正在编译
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+/", line)))
            driver = browser(profile, f"--accept-lang={args.lang}", f"--window-size={args.size.replace('x', ',')}")
            try:
                width, height = map(int, args.size.split("x"))
                # 手机那么窄的窗口，Chromium 自己开不出来
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                    "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
                })
                if args.dark:
                    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]})
                take(driver, url, prompt=args.text, tokens=args.tokens, to=args.to)
            finally:
                driver.quit()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
