"""The figures of docs/scale.md, and MFU in the package, are those of the files in benchmarks/results."""

from __future__ import annotations

import shutil

import pytest

import scale_page
from puzzle.run import shapes


def test_the_page_is_up_to_date():
    assert scale_page.CODE.read_text(encoding="utf-8") == scale_page.code(), "run `make results`"
    assert float(scale_page.measured()["mfu"]) == shapes.MFU
    assert scale_page.PAGE.read_text(encoding="utf-8") == scale_page.page(), "run `make results`"


def test_a_new_measurement_reaches_every_figure(tmp_path, monkeypatch):
    """Twice the share of the FLOPs is half the time, everywhere."""
    for name in ("build_8b_steps.csv", "profile.csv"):
        shutil.copy(scale_page.RESULTS / name, tmp_path / name)
    before, mfu = scale_page.page(), shapes.MFU
    with open(tmp_path / "build_8b_steps.csv", "a", encoding="utf-8") as steps:
        steps.write(f"a faster one,,16384,0.04,12438,{2 * mfu},1,NVIDIA H100,2.11,2027-01-02\n")
        steps.write("fast with something off,norm,16384,0.04,12438,9,1,NVIDIA H100,2.11,2027-01-02\n")
    monkeypatch.setattr(scale_page, "RESULTS", tmp_path)
    monkeypatch.setattr(shapes, "MFU", 2 * mfu)
    for cached in (scale_page.dry_run, scale_page.of_seed):
        cached.cache_clear()
    after = scale_page.page()
    assert f"MFU = {2 * mfu}  #" in scale_page.code()
    assert f"MFU is {2 * mfu}, measured" in after
    assert "2027-01-02" in after
    for told in ("build: GPU-hours", "heal: GPU-hours"):
        old, new = (
            [float(cell.replace(",", "")) for cell in line.split(" | ")[1:]]
            for line in (next(x for x in text.splitlines() if told in x).rstrip(" |") for text in (before, after))
        )
        assert new == pytest.approx([value / 2 for value in old], rel=0.02, abs=0.6)
    for cached in (scale_page.dry_run, scale_page.of_seed):
        cached.cache_clear()


def test_a_page_without_its_markers(tmp_path, monkeypatch):
    (tmp_path / "scale.md").write_text(scale_page.PAGE.read_text(encoding="utf-8").replace("<!-- end of seeds -->", ""))
    monkeypatch.setattr(scale_page, "PAGE", tmp_path / "scale.md")
    with pytest.raises(ValueError, match="lacks the markers of 'seeds'"):
        scale_page.page()
