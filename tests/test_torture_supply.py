"""A short form of benchmarks/torture/supply.py."""

import hashlib
import json
import random

import pytest
from conftest import torture

from nanogpt.base.config import ROOT, TRUSTED_TARGETS
from nanogpt.data import assets
from nanogpt.weights import checkpoint


@pytest.fixture
def ledger():
    """A ledger that must have nothing broken at the end."""
    made = torture("ledger").Ledger("supply", "short")
    yield made
    assert made.cases and not made.broken


def test_every_distribution_that_the_requirements_reach_is_pinned_to_the_version_installed(ledger):
    torture("supply").attack_pins(ledger)
    assert ledger.cases > 60


def test_a_changed_byte_is_noticed_and_certificates_are_checked(ledger):
    supply = torture("supply")
    supply.attack_hashes(ledger, 40, random.Random(1))
    supply.attack_certificates(ledger)
    supply.attack_resuming(ledger, 1, random.Random(1))


@pytest.mark.parametrize("tls", [False, True])
def test_whatever_a_server_sends_is_refused_in_one_line_and_not_kept(ledger, tls):
    torture("supply").attack_faults(ledger, every=7, tls=tls)


def test_the_judge_sees_what_is_wrong(monkeypatch, ledger):
    supply, server = torture("supply"), torture("bad_server")
    content = supply.CONTENT
    asset = assets.Asset("a.bin", hashlib.sha256(content).hexdigest(), len(content))

    def refused(fault, seconds=5.0):
        with server.BadServer({"/a": fault}) as bad, supply.impatient(seconds):
            return supply.refusal(supply.dataclasses.replace(asset, urls=(f"{bad.address}/a",)))

    flipped = server.plain(bytes([content[0] ^ 1]) + content[1:])
    assert refused(server.plain(content)) is None and refused(flipped) is None

    def trusting(asset, obtain, reasons, place):
        obtain(assets.cache_folder() / asset.name)
        return assets.cache_folder() / asset.name

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_accept", trusting)
        assert refused(flipped) == "accepted something else" and refused(server.not_found).startswith("left ")
    monkeypatch.setattr(supply, "LONGEST_S", 0.3)
    assert refused(lambda line: line.over.wait(20), 0.4).startswith("took ")
    ledger.count("judge", "sees")


def test_what_security_says_is_what_the_program_and_its_figures_say():
    record = json.loads((ROOT / "benchmarks/results/torture_supply.json").read_text(encoding="utf-8"))
    assert not record["broken"] and len(TRUSTED_TARGETS) == 5
    assert assets.TIMEOUT_S == 20 and assets.MOST_PAGE == 16 * 2**20
    for name in ("SECURITY.md", "SECURITY.zh-CN.md"):
        said = (ROOT / name).read_text(encoding="utf-8")
        assert f"{record['cases']:,}" in said
        for file in (*checkpoint.FILES, *checkpoint.FILES_1, "manifest.json", "run.json"):
            assert f"`{file}`" in said, file
