"""What is published comes from the JSON, and what is published in this repository is what its JSON says."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_kit import example_result, train_row

from benchmarks import publish
from benchmarks.harness import results

ROW = "| Llama-3.1-8B shape, LoRA r=16, 4 x 2048 tokens, nothing recomputed | stale | stale | stale |"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        f"# name\n\n| what | on | result | how |\n|---|---|---|---|\n{ROW}\n| else | a | b | c |\n"
    )
    (tmp_path / "results").mkdir()
    results.write(example_result(), tmp_path / "results" / "h900-2026-01-02.json")
    return tmp_path


def call(root: Path, *more: str) -> int:
    return publish.main(["--root", str(root), "--results", str(root / "results"), *more])


def test_the_repository_says_what_its_results_say() -> None:
    """If this fails: python -m benchmarks.publish."""
    found = results.newest()
    for path, text in publish.texts(publish.ROOT, found).items():
        assert path.read_text() == text, f"{path} is stale: run python -m benchmarks.publish"
    for result in found:
        for picture, part in publish.PICTURES.items():
            if part in result:
                assert (publish.ROOT / "docs" / publish.picture_name(picture, result, found)).exists()


def test_page_and_pictures_come_from_the_figures(root: Path) -> None:
    assert call(root) == 0
    page = (root / "docs" / "benchmarks.md").read_text()
    for figure in (
        "400 ms, 40.2 GiB", "500 ms, 40.2 GiB (1.25x)", "410 ms, 40 GiB", "5.0e-04 (Unsloth)", "_norm_fwd 5.2", "0.12",
        "| 8b-lora keep | 3 | 1999 | 1 | 777 | 390 |", "2.00 TB/s", "400.00 TFLOP/s", "50%", "2.7534", "+0.25", "0.0123",
        "444 ms, 40.2 GiB | Unsloth 1.25x |", "| 40.25 | 38.64 | -4.0% | 16 of 32 layers so |", "(budget.png)",
        "| 8b-qlora | 1.5x | 12.00 | 11.50 | 7.60 | -33.9% | yes | 707 | a plan |",
        "| 24 GiB | 163,840; 262,144 fails | 65,536 |", "| hasten | - | 8,192 | 7.50 | 22.50 | 21.00 | 75.2 | a plan |",
        "fails: OutOfMemoryError: CUDA out of memory", "6.25 GiB and 0.1250 GiB for every 1,024", "0.015 GiB (0.20%)",
        "memcheck | norms | yes", "median of 150", "mean 181", "| 245.6% | 41.0k | 1.00x | 9.5 | 0.0e+00 |",
        "| packed to 4,096 tokens | 0.0% | 102.5k | 2.50x | 6.5 | 3.0e-05 |", "| 0.0% | - | - | - | 5.0e-01 |", "torch 9.8.7", "10.5 | 3.5 | beside 1 others",
    ):  # fmt: skip
        assert figure in page, figure
    assert "trl not installed" not in page
    for name in ("roofline.png", "budget.png", "curves.png"):
        assert (root / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_another_figure_makes_the_page_and_the_readme_stale(root: Path) -> None:
    call(root)
    assert call(root, "--check") == 0
    changed = example_result()
    changed["train"][0]["ms"] = 390.0
    results.write(changed, root / "results" / "h900-2026-01-02.json")
    before = (root / "README.md").read_text()
    assert call(root, "--check") == 1 and (root / "README.md").read_text() == before
    assert call(root) == 0 and "390 ms and 40.2 GiB" in (root / "README.md").read_text()


def test_the_readme_row_is_written_from_the_largest_race_and_other_rows_stay(root: Path) -> None:
    call(root)
    lines = (root / "README.md").read_text().splitlines()
    assert lines[4].startswith(
        "| Llama-3.1-8B shape, LoRA r=16, 4 x 2048 tokens, nothing recomputed | one H900 | 400 ms and 40.2 GiB a step; "
        "Unsloth 2026.1.1 in the same run 500 ms and 40.2 GiB | `python -m benchmarks.gpu "
    )
    assert lines[5] == "| else | a | b | c |" and lines[0] == "# name"


def test_a_readme_row_without_figures_is_an_error(root: Path) -> None:
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("LoRA r=16, 4 x", "QLoRA r=16, 4 x"))
    with pytest.raises(LookupError, match="8b-qlora, keep"):
        call(root)


def test_failed_rows_show_why_and_no_figures(root: Path) -> None:
    parity = {"ok": False, "worst": 0.0123, "step": 4, "compared": 9, "against": "transformers"}
    failed, dead = (
        train_row("liger", 1, parity=parity, group="g"),
        train_row("trl", 1, error="OutOfMemoryError: no\nx", group="g"),
    )
    del failed["ms"], dead["ms"]
    rows = [train_row("hasten", 300, group="g"), failed, dead]
    results.write(example_result() | {"train": rows}, root / "results" / "h900-2026-01-02.json")
    call(root)
    page = (root / "docs" / "benchmarks.md").read_text()
    assert "losses 1.2e-02 from transformers + PEFT at step 4" in page and "fails: OutOfMemoryError: no |" in page


def test_parts_of_a_result_may_be_missing(root: Path) -> None:
    little = {key: example_result()[key] for key in ("date", "versions", "train")}
    results.write(little, root / "results" / "h900-2026-01-02.json")
    assert call(root) == 0
    assert "| - |" in (root / "docs" / "benchmarks.md").read_text()  # no ceilings, no floor


def part(**changes: Any) -> dict[str, Any]:
    return {"date": "2026-01-02", "versions": {"gpu": "NVIDIA H900", "torch": "9.8.7"}, **changes}


def test_merging_keeps_the_later_of_two_and_adds_the_rest(root: Path) -> None:
    later = part(
        versions={"gpu": "NVIDIA H900", "torch": "9.8.7", "trl": "1.0"},
        train=[train_row("hasten", 111), train_row("hasten", 222, job="1b-lora")],
        ops=[{"op": "MLP", "ms": 9.0, "bytes": 1e9, "flops": 4e12}],
        tests="all passed",
    )
    (root / "later.json").write_text(json.dumps(later))
    assert call(root, "--merge", str(root / "later.json")) == 0
    merged = results.read(root / "results" / "h900-2026-01-02.json")
    rows = [row for row in merged["train"] if row["mode"] == "keep"]
    told = {(row["job"], row["group"], row["variant"]): row["ms"] for row in rows}
    assert told == {
        ("8b-lora", "hasten+unsloth", "hasten"): 111, ("8b-lora", "hasten+unsloth", "unsloth"): 500.5,
        ("8b-lora", "hasten", "hasten"): 411.1, ("1b-lora", "hasten+unsloth", "hasten"): 222,
    }  # fmt: skip
    assert [row["ms"] for row in merged["ops"]] == [0.05, 9.0] and merged["tests"] == "all passed"
    assert merged["versions"]["trl"] == "1.0" and "curves" in merged


def test_fresh_replaces_what_was_there(root: Path) -> None:
    (root / "new.json").write_text(json.dumps(part(train=[train_row("hasten", 111)])))
    assert call(root, "--merge", str(root / "new.json"), "--fresh") == 0
    assert set(results.read(root / "results" / "h900-2026-01-02.json")) == {"date", "versions", "fixed_costs", "train"}


@pytest.mark.parametrize(
    ("other", "said"),
    [(part(date="2026-01-03"), "different dates"), (part(versions={"gpu": "NVIDIA H900", "torch": "1.0"}), "torch is")],
)
def test_what_does_not_belong_together_is_not_merged(other: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        results.merge([part(), other])


def test_only_the_newest_of_each_gpu_is_shown(tmp_path: Path) -> None:
    for name in ("h900-2026-01-02", "h900-2026-02-01", "b1-2025-01-01"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name}))
    assert [one["name"] for one in results.newest(tmp_path)] == ["b1-2025-01-01", "h900-2026-02-01"]
    with pytest.raises(FileNotFoundError):
        results.newest(tmp_path / "nothing")
