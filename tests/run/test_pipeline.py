"""`puzzle run`: the whole road on the tiny parent."""

from __future__ import annotations

import json
import shutil


def test_run_goes_the_whole_road_and_resumes(puzzle, one_line_error, parent, corpus, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
parent: {parent}
data: {corpus}
build: {{attention: "kv1,none", ffn: "0.5,none", tokens: 1e3, seq_len: 32, batch_size: 4, validation_sequences: 4}}
score: {{sequences: 4}}
profile: {{batches: [1, 2]}}
goal: {{throughput: 1.3x}}
workload: {{input_len: 8, output_len: 8}}
evaluate: {{sequences: 4, repeats: 1}}
""")
    done = puzzle("run", recipe, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["schema"] == 1
    assert set(result["predicted"]) == set(result["measured"])
    assert result["predicted"]["memory_bytes"] == result["measured"]["memory_bytes"]
    assert result["predicted"]["kv_bytes_per_token"] == result["measured"]["kv_bytes_per_token"]
    assert result["predicted"]["speedup"] >= 1.3
    assert {"kl", "sum_of_scores", "top1_agreement"} <= set(result["child"])
    blocks = {p: p.stat().st_mtime_ns for p in (tmp_path / "run/library/blocks").rglob("*.safetensors")}
    shutil.rmtree(tmp_path / "run/child")
    again = puzzle("run", recipe, "--out", tmp_path / "run")
    assert again.exit_code == 0, again.output
    assert "nothing to train" in again.stderr
    assert blocks == {p: p.stat().st_mtime_ns for p in (tmp_path / "run/library/blocks").rglob("*.safetensors")}
    recipe.write_text(recipe.read_text().replace("1.3x", "1000x"))
    one_line_error(puzzle("run", recipe, "--out", tmp_path / "run"), "goal.throughput 1000x cannot be met")
