"""Parent and child in real engines: the same greedy text as ours, and tokens per second beside the prediction.

    python benchmarks/serving/bench_serving.py LIBRARY SOLUTION [--parent DIR] [--engines puzzle vllm llama.cpp llama.cpp-batch]
        [--requests 64] [--rounds 5] [--threads 1] [--fit DIRECTORY] [--out FILE.csv]
    python benchmarks/serving/bench_serving.py library solution --parent examples/parent --rounds 3 --fit fit \\
        --out benchmarks/results/serving.csv

Protocol: both are exported for the engine in float32. `requests` prompts of 128 tokens of Python, 128 greedy tokens each.
vllm: `vllm serve` of each model, both up at the same time on ports of their own, asked over HTTP (OpenAI completions,
streaming, all requests at once) in turns, parent, child, parent, ...; one more round through the official OpenAI package.
llama.cpp: llama-cpp-python's OpenAI server in the same way, which answers one request after the other. llama.cpp-batch: all
sequences decoded together in one context of llama.cpp's library. puzzle: the runtime that `puzzle profile` measures.
Text is compared with what puzzle's own runtime generates in float32; a text that leaves it at a token whose logit is within
NEAR of the best is counted as a near tie. llama-cpp-python's server leaves out the text of tokens longer than 32 bytes (such as a
newline with 36 spaces): a text with one of them counts as another, although the tokens are the same. tokens_per_s: generated tokens over the time from the first
request to the last token, prompts included; median and best of the rounds. speedup: child over parent, of the medians.
predicted_speedup: of `puzzle solve --gpu cpu` at this batch, the sum of the parts of puzzle's own runtime; it knows nothing
of an engine. With --fit DIRECTORY vLLM is also measured at 1, 16 and 64 requests on the parent and on three uniform
children, `puzzle profile --engine vllm --gpu cpu --fit` fits the engine's constants to those figures, and the fit predicts the child,
which it has not seen; a fit.json that is there is used as it is. Environments: benchmarks/lib/serving_environments.py.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from puzzle.base.files import write_json
from puzzle.base.machine import cpu_name
from puzzle.base.workload import Workload
from puzzle.choose.cost_model import CostModel
from puzzle.choose.solve import open_costs
from puzzle.export.sources import child_of_library
from puzzle.export.write import Source, export, open_source
from puzzle.library.assemble import open_parent
from puzzle.library.manifest import Library
from puzzle.measure.serve import serve
from puzzle.parents.structure import Layer
from puzzle.profile.engine import read_fit
from puzzle.profile.engine_fit import fit_engine
from puzzle.profile.parts import ends_of, priced_as
from puzzle.runtime.model import CausalModel, load_model
from puzzle.runtime.plain import PlainRuntime
from serving_environments import python_of, require

BENCHMARKS = Path(__file__).resolve().parents[1]
WORK = Workload(input_len=128, output_len=128)
MODELS = ("parent", "child")
NEAR = 2e-3  # standard deviations of the logits: twice what serve-check allows an engine to differ
UNIFORM = {  # in every layer: children that an engine is fitted to
    "narrow": {"ffn": "0.25"},
    "few-kv-heads": {"attention": "kv1"},
    "half": {"attention": "kv2", "ffn": "0.5"},
}
FIT_REQUESTS = (1, 16, 64)


def make_prompts(directory: Path, count: int) -> list[list[int]]:
    """Token ids from the middle of the standard library's modules, one prompt from each, whose text encodes to them."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found: list[list[int]] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        ids = tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore"), add_special_tokens=False).ids
        for start in range(WORK.input_len, min(len(ids), 4 * WORK.input_len) - WORK.input_len, 8):
            prompt = ids[start : start + WORK.input_len]
            text = tokenizer.decode(prompt, skip_special_tokens=False)
            if tokenizer.encode(text, add_special_tokens=False).ids == prompt:
                found.append(prompt)
                break
        if len(found) == count:
            return found
    sys.exit(f"error: the standard library has {len(found)} modules that are long enough: ask for fewer --requests")


def our_runtime(model: CausalModel, batch: int) -> PlainRuntime:
    return PlainRuntime(model, batch, WORK.input_len + WORK.output_len)


def our_tokens(model: CausalModel, prompts: list[list[int]]) -> list[list[int]]:
    return our_runtime(model, len(prompts)).generate(torch.tensor(prompts), WORK.output_len).tolist()


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@contextlib.contextmanager
def serving(engine: str, path: Path, name: str, requests: int, threads: int) -> Iterator[str]:
    """Start an engine's OpenAI server, wait until it answers, give its URL, stop it. Its output: beside the export."""
    port, python = free_port(), python_of(engine)
    length = WORK.input_len + WORK.output_len
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if engine == "vllm":
        command = [str(python.with_name("vllm")), "serve", str(path), "--trust-remote-code", "--dtype", "float32"]
        command += ["--max-model-len", str(length), "--max-num-seqs", str(requests), "--no-enable-prefix-caching"]
        command += ["--served-model-name", name]
    else:
        command = [str(python), "-m", "llama_cpp.server", "--model", str(path), "--n_threads", str(threads)]
        command += ["--n_threads_batch", str(threads), "--n_ctx", str(length), "--interrupt_requests", "false"]
        command += ["--model_alias", name, "--host", "127.0.0.1", "--type_k", "0", "--type_v", "0"]  # float32 cache
    with open(path.with_name(f"{path.name}.log"), "w", encoding="utf-8") as log:
        started = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(600):
            if started.poll() is not None:
                sys.exit(f"error: {engine} stopped with code {started.returncode}: see {log.name}")
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/models", timeout=2).close()
                break
            time.sleep(1)
        yield url
    finally:
        os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)


def ask(directory: Path, url: str, name: str, prompts: list[Any], client: str, extra: dict[str, Any]) -> dict[str, Any]:
    """One round of all prompts at once through serving_client.py, in a process of its own."""
    job = {"url": url, "model": name, "prompts": prompts, "num_tokens": WORK.output_len, "client": client}
    return worker(python_of("vllm"), "serving_client.py", directory, {**job, "extra": extra})


def worker(python: Path, script: str, directory: Path, job: dict[str, Any]) -> dict[str, Any]:
    (directory / "job.json").write_text(json.dumps(job), encoding="utf-8")
    subprocess.run(
        [str(python), str(BENCHMARKS / "lib" / script), str(directory / "job.json"), str(directory / "answer.json")],
        check=True,
    )
    return json.loads((directory / "answer.json").read_text(encoding="utf-8"))


def version_of(engine: str) -> str:
    names = {"vllm": "vllm", "llama.cpp": "llama-cpp-python"}
    code = f"import importlib.metadata as m; print(m.version('{names[engine]}'))"
    done = subprocess.run([str(python_of(engine)), "-c", code], check=True, capture_output=True, text=True)
    return f"{names[engine]} {done.stdout.strip()}"


class Bench:
    """sources: what is exported, by name. expected: our tokens of each model; texts: decoded, whole or up to the end token."""

    def __init__(self, arguments: argparse.Namespace, directory: Path):
        self.arguments, self.directory = arguments, directory
        self.library = Library.open(arguments.library)
        found = open_source(arguments.library, arguments.solution, arguments.parent and str(arguments.parent))
        self.parent = open_parent(self.library, arguments.parent and str(arguments.parent))
        home = self.parent.directory
        self.sources: dict[str, Source] = {"parent": open_source(home), "child": found}
        assert found.solved is not None, "a library was opened with an architecture"
        self.layers: dict[str, Sequence[Layer]] = {
            "parent": self.library.structure.layers,
            "child": found.solved.sub_blocks,
        }
        self.prompts = make_prompts(home, arguments.requests)
        self.tokenizer = Tokenizer.from_file(str(home / "tokenizer.json"))
        self.eos = found.child.eos_token_id
        self.models: dict[str, CausalModel] = {}
        self.expected: dict[str, list[list[int]]] = {}
        for name in MODELS:
            written = export(self.sources[name], directory / f"{name}-hf", dtype="float32")
            self.models[name] = load_model(written.out)
            self.expected[name] = our_tokens(self.models[name], self.prompts)
        self.costs = CostModel(self.library, open_costs(self.library, "cpu", None, "puzzle"), WORK)
        self.rows: list[dict[str, Any]] = []

    def written(self, name: str, engine: str) -> Path:
        out = self.directory / (f"{name}.gguf" if engine == "llama.cpp" else f"{name}-{engine}")
        if not out.exists():
            export(self.sources[name], out, engine=engine, dtype="float32")
        return out

    def prompt_texts(self) -> list[str]:
        return [self.tokenizer.decode(ids, skip_special_tokens=False) for ids in self.prompts]

    def num_same(self, name: str, texts: list[str], stops: bool = False) -> tuple[int, int]:
        """(texts that are ours, texts that leave ours at a near tie). stops: they end before the end token."""
        same = ties = 0
        for prompt, ids, text in zip(self.prompts, self.expected[name], texts, strict=True):
            cut = ids[: ids.index(self.eos)] if stops and self.eos in ids else ids
            if self.tokenizer.decode(cut) == text:
                same += 1
            else:
                whole = self.tokenizer.decode(prompt, skip_special_tokens=False) + text
                theirs = self.tokenizer.encode(whole, add_special_tokens=False).ids[len(prompt) :]
                ties += self.is_near_tie(name, prompt, ids, theirs)
        return same, ties

    @torch.inference_mode()
    def is_near_tie(self, name: str, prompt: list[int], ours: list[int], theirs: list[int]) -> bool:
        """Whether at the first other token its logit is as good as the best, within NEAR standard deviations."""
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return False
        logits = self.models[name](torch.tensor([prompt + ours[:at]]))[0, -1]
        gap = float((logits.max() - logits[theirs[at]]) / logits.std())
        print(f"{name}: other token at place {at}, {gap:.1e} standard deviations below the best", flush=True)
        return gap <= NEAR

    def predicted(self, name: str) -> float:
        batches = [b for b in self.costs.batches if b <= self.arguments.requests]
        return self.costs.predict(self.layers[name], max(batches)).tokens_per_second

    def add(
        self, engine: str, how: str, version: str, rates: dict[str, list[float]], same: dict[str, tuple[int, int]]
    ) -> None:
        """A row for each model. rates: tokens per second of the rounds."""
        for name in MODELS:
            self.rows.append(
                {
                    "engine": engine,
                    "how": how,
                    "model": name,
                    "tokens_per_s_median": f"{median(rates[name]):.0f}",
                    "tokens_per_s_best": f"{max(rates[name]):.0f}",
                    "rounds": len(rates[name]),
                    "speedup": f"{median(rates[name]) / median(rates['parent']):.2f}",
                    "speedup_of_best": f"{max(rates[name]) / max(rates['parent']):.2f}",
                    "predicted_tokens_per_s": f"{self.predicted(name):.0f}",
                    "predicted_speedup": f"{self.predicted(name) / self.predicted('parent'):.2f}",
                    "fit_tokens_per_s": "",
                    "fit_speedup": "",
                    "same_greedy_text": f"{same[name][0]}/{len(self.prompts)}",
                    "near_ties": same[name][1],
                    "version": version,
                }
            )
            print({key: value for key, value in self.rows[-1].items() if value != ""}, flush=True)

    def over_http(self, engine: str, rounds: int) -> None:
        """Both servers up, asked in turns."""
        stops = engine == "llama.cpp"  # its server ends at the end token, whatever it is asked
        prompts = self.prompt_texts() if stops else self.prompts
        extra = {"repeat_penalty": 1.0} if stops else {"ignore_eos": True}
        rates: dict[str, list[float]] = {name: [] for name in MODELS}
        through_openai: dict[str, list[float]] = {name: [] for name in MODELS}
        same = dict.fromkeys(MODELS, (len(self.prompts), 0))
        with contextlib.ExitStack() as stack:
            urls = {}
            for name in MODELS:
                started = serving(engine, self.written(name, engine), name, len(self.prompts), self.arguments.threads)
                urls[name] = stack.enter_context(started)
            num_warm = 0 if stops else 1  # rounds that do not count
            for number, name in itertools.product(range(1 + num_warm + rounds), MODELS):
                client = "openai" if number == 0 else "stdlib"
                answer = ask(self.directory, urls[name], name, prompts, client, extra)
                same[name] = min(same[name], self.num_same(name, answer["texts"], stops))
                num_tokens = sum(answer["num_tokens"]) or sum(
                    len(self.tokenizer.encode(text, add_special_tokens=False).ids) for text in answer["texts"]
                )
                if number == 0 or number > num_warm:
                    (rates if number else through_openai)[name].append(num_tokens / answer["seconds"])
        how = f"{len(prompts)} concurrent streaming requests over HTTP"
        how += ", answered one after the other" if stops else ""
        self.add(engine, how, version_of(engine), rates, same)
        self.add(engine, f"{how}, official OpenAI package", version_of(engine), through_openai, same)

    def in_llama_cpp(self, rounds: int) -> None:
        rates: dict[str, list[float]] = {name: [] for name in MODELS}
        same, version = {}, ""
        for _, name in itertools.product(range(rounds), MODELS):
            job = {
                "model": str(self.written(name, "llama.cpp")),
                "prompts": self.prompts,
                "num_tokens": WORK.output_len,
            }
            job |= {"threads": self.arguments.threads, "rounds": 1}
            answer = worker(python_of("llama.cpp"), "serving_llama_cpp.py", self.directory, job)
            rates[name] += [len(self.prompts) * WORK.output_len / seconds for seconds in answer["seconds"]]
            pairs = list(zip(self.prompts, self.expected[name], answer["tokens"], strict=True))
            equal = sum(ours == theirs for _, ours, theirs in pairs)
            same[name] = equal, sum(self.is_near_tie(name, *each) for each in pairs if each[1] != each[2])
            version = answer["version"]
        self.add("llama.cpp", f"batch of {len(self.prompts)} sequences in its library", version, rates, same)

    def in_puzzle(self, rounds: int) -> None:
        torch.set_num_threads(self.arguments.threads)
        makers = {name: partial(our_runtime, self.models[name], len(self.prompts)) for name in MODELS}
        rates: dict[str, list[float]] = {name: [] for name in MODELS}
        for _ in range(rounds):
            for name, found in serve(makers, WORK, repeats=1).items():
                rates[name].append(found.tokens_per_second)
        same = dict.fromkeys(MODELS, (len(self.prompts), 0))
        self.add("puzzle", f"batch of {len(self.prompts)}, no engine", "puzzle", rates, same)

    def fit(self, folder: Path, rounds: int) -> None:
        """Measure vLLM on the parent and on uniform children, and fit its constants to that."""
        folder.mkdir(parents=True, exist_ok=True)
        head = ends_of(self.library.structure)[-1]
        described: dict[str, Any] = {
            "gpu": "cpu", "device": cpu_name(), "versions": version_of("vllm"), "precision": "float32",
            "date": datetime.date.today().isoformat(), "architectures": {},
        }  # fmt: skip
        rows = []
        for name in ("parent", *UNIFORM):
            if name in UNIFORM:
                child = child_of_library(self.library, [UNIFORM[name]] * self.library.num_layers, self.parent)
                self.sources[name] = Source(child=child, solved=None, facts=None, measured=None)
            counts = Counter(priced_as(sub_block) for _, _, sub_block in self.sources[name].child.structure)
            described["architectures"][name] = {"sub_blocks": dict(counts), "head": head.key()}
            path = self.written(name, "vllm")
            with serving("vllm", path, name, max(FIT_REQUESTS), self.arguments.threads) as url:
                for count in FIT_REQUESTS:
                    prompts = self.prompts[:count]
                    found = [
                        ask(self.directory, url, name, prompts, "stdlib", {"ignore_eos": True})
                        for _ in range(rounds + 1)
                    ][1:]
                    rows.append(
                        {
                            "architecture": name,
                            "num_seqs": count,
                            "input_len": WORK.input_len,
                            "output_len": WORK.output_len,
                            "decode_step_ms": f"{1e3 * median(median(f['gap_seconds']) for f in found):.3f}",
                            "output_tokens_per_s": f"{median(count * WORK.output_len / f['seconds'] for f in found):.1f}",
                        }
                    )
                    print(rows[-1], flush=True)
        write_json(folder / "architectures.json", described)
        with open(folder / "measured.csv", "w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        print(
            json.dumps(
                {
                    k: v
                    for k, v in fit_engine("vllm", folder / "measured.csv", gpu="cpu").items()
                    if k in ("constants", "errors", "leave_one_out")
                }
            )
        )

    def use_fit(self, folder: Path) -> None:
        """Fill in what the fit predicts of parent and child in vLLM."""
        structure = self.library.structure
        engine = CostModel(self.library, read_fit(folder / "fit.json", (structure, structure.usual)), WORK)
        predicted = {name: engine.predict(self.layers[name], len(self.prompts)).tokens_per_second for name in MODELS}
        for row in self.rows:
            if row["engine"] == "vllm":
                row["fit_tokens_per_s"] = f"{predicted[row['model']]:.0f}"
                row["fit_speedup"] = f"{predicted[row['model']] / predicted['parent']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("solution", type=Path)
    parser.add_argument("--parent", type=Path, default=None)
    engines = ["puzzle", "vllm", "llama.cpp", "llama.cpp-batch"]
    parser.add_argument("--engines", nargs="+", default=engines, choices=engines)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the engine; the client needs a core too")
    parser.add_argument("--fit", type=Path, default=None, metavar="DIRECTORY")
    parser.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "serving.csv")
    arguments = parser.parse_args()
    fits = arguments.fit is not None and not (arguments.fit / "fit.json").is_file()
    needed = {engine.removesuffix("-batch") for engine in arguments.engines} - {"puzzle"}
    if fits or "llama.cpp" in arguments.engines:
        needed.add("vllm")  # it is what is fitted, and its environment has the client
    require(sorted(needed))
    with tempfile.TemporaryDirectory(prefix="bench-serving-") as temporary:
        bench = Bench(arguments, Path(temporary))
        if "puzzle" in arguments.engines:
            bench.in_puzzle(arguments.rounds)
        if "vllm" in arguments.engines:
            bench.over_http("vllm", arguments.rounds)
        if "llama.cpp" in arguments.engines:
            bench.over_http("llama.cpp", 1)
        if "llama.cpp-batch" in arguments.engines:
            bench.in_llama_cpp(arguments.rounds)
        write_rows(arguments, bench.rows)
        if arguments.fit is not None:
            if fits:
                bench.fit(arguments.fit, max(1, arguments.rounds // 2))
            bench.use_fit(arguments.fit)
            write_rows(arguments, bench.rows)


def write_rows(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    facts = {
        "dtype": "float32",
        "threads": arguments.threads,
        "load_1min": f"{os.getloadavg()[0]:.1f}",
        "device": cpu_name(),
        "date": datetime.date.today().isoformat(),
        "command": re.sub(r"(?<=\s)/\S*/(?=\S)", "", " ".join(["python", *sys.argv])).strip(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    print(f"wrote {arguments.out}", flush=True)


if __name__ == "__main__":
    main()
