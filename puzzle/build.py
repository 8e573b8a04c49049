"""Build a block library: the parent runs once, layer group by layer group, and every variant trains beside it.

A group's layers and variants are on the device together. The residual streams that enter the group come from the
embedding (first group) or from host memory, where the previous group left its outputs, so the parent runs once in
total whatever the number of groups. A snapshot every minute lets a killed run continue where it was, bit for bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from puzzle import __version__
from puzzle.blocklib.distill import Recipe, VariantTrainer, autocast, calibrate
from puzzle.blocklib.layer import KINDS, Kind, LayerSpec, ParentLayer, rope_tables
from puzzle.blocklib.modules import Rope
from puzzle.blocklib.store import BlockStore, layer_name
from puzzle.blocklib.variant import PARENT, parse_variant, search_space
from puzzle.console import bytes_text, console, progress
from puzzle.data import TokenData, load_tokens
from puzzle.errors import UserError
from puzzle.families.family import HfModel, open_model
from puzzle.files import check_writable, content_hash, read_json, replacing, write_json
from puzzle.hardware import available_memory
from puzzle.model import parent_module
from puzzle.plan import BuildPlan, plan_build

SNAPSHOT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """What `puzzle build-library` was asked for. tokens: training tokens; attention, ffn: names or None (default)."""

    data: list[str]
    out: Path
    attention: str | None = None
    ffn: str | None = None
    layers: str | None = None
    tokens: int = 1_000_000
    seq_len: int = 1024
    batch_size: int = 8
    lr: float = 1e-3
    text_field: str = "text"
    seed: int = 0
    calibration_sequences: int = 64
    validation_sequences: int = 16
    group_size: int | None = None
    memory_limit: int | None = None
    device: str = "auto"
    snapshot_seconds: float = field(default=SNAPSHOT_SECONDS)

    def recipe(self) -> Recipe:
        return Recipe(
            num_steps=max(1, round(self.tokens / (self.batch_size * self.seq_len))),
            batch_size=self.batch_size,
            seq_len=self.seq_len,
            lr=self.lr,
            calibration_sequences=self.calibration_sequences,
            validation_sequences=self.validation_sequences,
        )


def pick_device(name: str) -> torch.device:
    """'auto', 'cpu' or 'cuda'. Raises UserError when a GPU is asked for and there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {name}: no CUDA GPU is visible here; use --device cpu or run where there is one")
    return torch.device(name)


def compute_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def parse_layers(text: str | None, num_layers: int) -> list[int]:
    """'0-3,7' -> [0, 1, 2, 3, 7]; None is all. Raises UserError outside the model or for anything else."""
    if text is None:
        return list(range(num_layers))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            begin, end = int(first), int(last or first)
        except ValueError:
            raise UserError(f"--layers {text}: '{part}' is no layer or range; write for example 0-3,7") from None
        if not 0 <= begin <= end < num_layers:
            raise UserError(f"--layers {text}: '{part}' is outside the parent's layers 0-{num_layers - 1}")
        chosen.update(range(begin, end + 1))
    return sorted(chosen)


def device_memory(device: torch.device, limit: int | None) -> int:
    """Bytes that training may use: 90 % of what is free now, and at most `limit`."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return min(int(0.9 * free), limit or free)


class Builder:
    """One library build: plan first (`plan`), then `run`."""

    def __init__(self, parent: HfModel, options: BuildOptions):
        self.parent, self.options = parent, options
        self.spec: LayerSpec = parent.spec
        self.recipe = options.recipe()
        self.device = pick_device(options.device)
        self.layers = parse_layers(options.layers, parent.num_layers)
        self.variants = search_space(parent.spec, options.attention, options.ffn)
        self.store = BlockStore(options.out)
        self.weight_dtype = _stored_dtype(parent)
        if options.seq_len > parent.max_length:
            raise UserError(f"--seq-len {options.seq_len} is longer than the parent's context of {parent.max_length}: "
                            f"use at most {parent.max_length}")  # fmt: skip
        if options.device != "cpu" and self.device.type == "cuda" and options.memory_limit:
            total = torch.cuda.mem_get_info(self.device)[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_limit / total), self.device)

    def plan(self) -> BuildPlan:
        compute = compute_dtype(self.device).itemsize
        return plan_build(
            self.spec,
            self.variants,
            self.recipe,
            layers=self.layers,
            memory_bytes=device_memory(self.device, self.options.memory_limit),
            compute_bytes=compute,
            stored_bytes=self.weight_dtype.itemsize,
            embedding_bytes=self.parent.vocab_size * self.spec.hidden_size * compute,
            group_size=self.options.group_size,
        )

    def load_data(self) -> TokenData:
        recipe = self.recipe
        return load_tokens(
            self.options.data,
            self.parent.directory,
            seq_len=recipe.seq_len,
            num_train=recipe.num_steps * recipe.batch_size,
            num_validation=recipe.validation_sequences,
            text_field=self.options.text_field,
            seed=self.options.seed,
        )

    def run(self, data: TokenData) -> None:
        """Train what is missing. Finished blocks of the same content key are kept as they are."""
        plan = self.plan()
        out = self.options.out
        check_writable(out)
        fingerprint = self.parent.checkpoint.fingerprint()
        self._write_facts(data, fingerprint)
        self._keys = {
            (layer, kind, name): content_hash(
                [fingerprint, layer, kind, name, asdict(self.recipe), data.hash, str(self.device.type)]
            )
            for layer in self.layers
            for kind in KINDS
            for name in self.variants[kind]
            if name != PARENT
        }
        self._data = data
        groups = self._with_gaps(plan.groups)
        missing = {g: [k for k in self._keys if k[0] in g and not self._has(k)] for g in groups}
        total = sum(len(m) for m in missing.values())
        if total == 0:
            console.print(f"library {out} is complete: nothing to train")
            return
        last = max(index for index, group in enumerate(groups) if missing[group])
        self._streams: dict[str, list[Tensor]] | None = None
        with progress("distil", self.recipe.num_steps * (last + 1)) as bar:
            for index, group in enumerate(groups[: last + 1]):
                self._run_group(group, missing[group], bar, keep_streams=index < last)
        console.print(f"trained {total} blocks into {out}")

    # -- one group -------------------------------------------------------------------------------------------

    def _run_group(self, group: tuple[int, ...], missing: list[tuple], bar, keep_streams: bool) -> None:
        started = time.monotonic()
        rope = rope_tables(self.spec, self.recipe.seq_len, self.device)
        layers, trainers = self._prepare_group(group, missing, rope)
        snapshot = self.options.out / ".work" / f"{layer_name(group[0])}-{layer_name(group[-1])}.safetensors"
        done_steps = self._load_snapshot(snapshot, trainers)
        if done_steps == 0:
            self._validate(layers, trainers, rope, "loss_before")
        last_saved = time.monotonic()
        for step in range(self.recipe.num_steps):
            train = step >= done_steps and bool(missing)
            if train or keep_streams:
                x = self._forward(self._input("train", step), layers, trainers if train else {}, rope, step)
                if keep_streams:
                    self._keep("train", step, x)
            bar.advance()
            if train and time.monotonic() - last_saved > self.options.snapshot_seconds:
                self._save_snapshot(snapshot, trainers, step + 1)
                last_saved = time.monotonic()
        if missing:
            self._validate(layers, trainers, rope, "loss_after")
            self._write_blocks(trainers, time.monotonic() - started)
        if keep_streams:
            self._advance_validation(layers, rope)
        snapshot.unlink(missing_ok=True)

    def _prepare_group(self, group, missing, rope: Rope):
        """The parent's modules of the group's layers, and a trainer for every missing block."""
        layers: list[tuple[int, nn.Module, nn.Module]] = []
        trainers: dict[int, list[VariantTrainer]] = {}
        streams = [self._input("train", i) for i in range(self._calibration_batches())] if missing else []
        for index in group:
            layer = self._to_device(self.parent.layer(index))
            attention, ffn = (parent_module(kind, self.spec, layer.weights(kind)) for kind in KINDS)
            layers.append((index, attention, ffn))
            if not streams:
                continue
            with torch.no_grad(), autocast(self.device):
                streams = [x + attention(x, rope) for x in streams]
            layer.calibration = calibrate(ffn, streams, self.spec)
            with torch.no_grad(), autocast(self.device):
                streams = [x + ffn(x, rope) for x in streams]
            trainers[index] = [
                VariantTrainer(layer, kind, parse_variant(kind, name, self.spec), self.recipe, self.device)
                for at, kind, name in missing
                if at == index
            ]
            layer.calibration = None
        return layers, trainers

    def _forward(self, x: Tensor, layers, trainers: dict[int, list[VariantTrainer]], rope: Rope, step: int) -> Tensor:
        """Run the parent's layers on x; every trainer takes its step from the activation that passes it."""
        for index, attention, ffn in layers:
            for module, kind in ((attention, "attention"), (ffn, "ffn")):
                with torch.no_grad(), autocast(self.device):
                    target = module(x, rope)
                for trainer in trainers.get(index, ()):
                    if trainer.kind == kind:
                        trainer.step(step, x, target, rope)
                x = x + target
        return x

    @torch.no_grad()
    def _validate(self, layers, trainers: dict[int, list[VariantTrainer]], rope: Rope, attribute: str) -> None:
        for batch in range(self._validation_batches()):
            x = self._input("validation", batch)
            for index, attention, ffn in layers:
                for module, kind in ((attention, "attention"), (ffn, "ffn")):
                    with autocast(self.device):
                        target = module(x, rope)
                    for trainer in trainers.get(index, ()):
                        if trainer.kind == kind:
                            trainer.validate(x, target, rope)
                    x = x + target
        for trainer in _all(trainers):
            setattr(trainer, attribute, trainer.validated())

    # -- residual streams ------------------------------------------------------------------------------------

    def _input(self, split: str, step: int) -> Tensor:
        """What enters the group: the embedding's output, or what the group before left in host memory. [B, T, H]"""
        if self._streams is not None and len(self._streams[split]) > step:
            return self._streams[split][step].to(self.device)
        size = self.recipe.batch_size
        if split == "train":
            ids = self._data.train_batch(step, size)
        else:
            ids = self._data.validation[step * size : (step + 1) * size].long()
        return self._embedding()(ids.to(self.device))

    def _keep(self, split: str, step: int, x: Tensor) -> None:
        if self._streams is None:
            self._streams = {"train": [], "validation": []}
        kept = self._streams[split]
        if len(kept) > step:
            kept[step].copy_(x)
        else:
            kept.append(x.to("cpu", copy=True))

    @torch.no_grad()
    def _advance_validation(self, layers, rope: Rope) -> None:
        for batch in range(self._validation_batches()):
            self._keep("validation", batch, self._forward(self._input("validation", batch), layers, {}, rope, 0))

    def _embedding(self) -> nn.Embedding:
        if not hasattr(self, "_embed"):
            weight = self.parent.embedding().to(self.device, compute_dtype(self.device))
            self._embed = nn.Embedding.from_pretrained(weight)
        return self._embed

    def _calibration_batches(self) -> int:
        return max(1, min(self.recipe.num_steps, -(-self.recipe.calibration_sequences // self.recipe.batch_size)))

    def _validation_batches(self) -> int:
        return -(-len(self._data.validation) // self.recipe.batch_size)

    # -- disk ------------------------------------------------------------------------------------------------

    def _has(self, key: tuple[int, Kind, str]) -> bool:
        return self.store.has(*key, self._keys[key])

    def _with_gaps(self, groups: tuple[tuple[int, ...], ...]) -> list[tuple[int, ...]]:
        """Every layer up to the last chosen one is in a group: the parent must pass through all of them."""
        filled: list[tuple[int, ...]] = []
        upcoming = 0
        for group in groups:
            filled.append(tuple(range(upcoming, group[-1] + 1)))
            upcoming = group[-1] + 1
        return filled

    def _to_device(self, layer: ParentLayer) -> ParentLayer:
        dtype = compute_dtype(self.device)
        for kind in KINDS:
            weights = layer.weights(kind)
            for name in weights:
                weights[name] = weights[name].to(self.device, dtype)
        return layer

    def _write_blocks(self, trainers: dict[int, list[VariantTrainer]], seconds: float) -> None:
        for index, of_layer in trainers.items():
            for trainer in of_layer:
                name = trainer.variant.name
                tensors = {n: p.detach().to(self.weight_dtype) for n, p in trainer.module.named_parameters()}
                spec = {"layer": index, "kind": trainer.kind, "variant": name,
                        "shape": trainer.variant.shape(self.spec)}  # fmt: skip
                record = {
                    "status": "trained" if tensors else "nothing to train",
                    "key": self._keys[index, trainer.kind, name],
                    "num_tokens": self.recipe.num_steps * self.recipe.batch_size * self.recipe.seq_len if tensors else 0,
                    "validation_loss_before": trainer.loss_before,
                    "validation_loss_after": trainer.loss_after,
                }
                self.store.write(index, trainer.kind, name, tensors, spec, record)
        write_json(
            self.options.out / "build.json",
            {"seconds_of_last_group": round(seconds, 1), "device": str(self.device), "torch": torch.__version__},
        )

    def _save_snapshot(self, path: Path, trainers: dict[int, list[VariantTrainer]], steps: int) -> None:
        tensors = {"steps": torch.tensor(steps), "group_key": _digest(list(self._keys.values()))}
        for trainer in _all(trainers):
            tensors |= {name: tensor.cpu() for name, tensor in trainer.state().items()}
            tensors[f"{trainer.key}|loss_before"] = torch.tensor(trainer.loss_before, dtype=torch.float64)
        with replacing(path) as temporary:
            save_file(tensors, temporary)

    def _load_snapshot(self, path: Path, trainers: dict[int, list[VariantTrainer]]) -> int:
        """Steps done, 0 without a usable snapshot of this very build."""
        if not path.is_file():
            return 0
        try:
            with safe_open(path, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError):
            return 0
        wanted = _digest(list(self._keys.values()))
        if not torch.equal(tensors.get("group_key", torch.empty(0, dtype=torch.uint8)), wanted):
            return 0
        if any(f"{t.key}|loss_before" not in tensors for t in _all(trainers)):
            return 0
        for trainer in _all(trainers):
            trainer.load_state(tensors)
            trainer.loss_before = tensors[f"{trainer.key}|loss_before"].item()
        return int(tensors["steps"])

    def _write_facts(self, data: TokenData, fingerprint: str) -> None:
        """library.json: new, or the same parent with the search space widened."""
        path = self.options.out / "library.json"
        source = self.parent.source
        local = Path(source).exists()
        out = self.options.out.absolute()
        variants = {kind: {name: self._describe(kind, name) for name in self.variants[kind]} for kind in KINDS}
        layers = set(self.layers)
        if path.is_file():
            old = read_json(path, "puzzle build-library")
            if old["parent"]["fingerprint"] != fingerprint:
                raise UserError(f"library {self.options.out} was built from another parent (fingerprint "
                                f"{old['parent']['fingerprint'][:12]}) than {source} ({fingerprint[:12]}): "
                                "use another --out")  # fmt: skip
            variants = {kind: old["variants"][kind] | variants[kind] for kind in KINDS}
            layers |= set(old["layers"])
        write_json(
            path,
            {
                "puzzle": __version__,
                "parent": {
                    "source": os.path.relpath(Path(source).absolute(), out) if local else source,
                    "relative": local,
                    "name": Path(source).absolute().name if local else source,
                    "fingerprint": fingerprint,
                    "config_hash": content_hash(self.parent.config),
                },
                "model": model_facts(self.parent),
                "data": {"hash": data.hash, "num_documents": data.num_documents, "num_sequences": len(data.train),
                         "seq_len": self.recipe.seq_len},
                "recipe": asdict(self.recipe),
                "seed": self.options.seed,
                "layers": sorted(layers),
                "variants": variants,
            },
        )  # fmt: skip

    def _describe(self, kind: Kind, name: str) -> dict:
        return describe_variant(kind, name, self.spec)


def describe_variant(kind: Kind, name: str, spec: LayerSpec) -> dict:
    """What library.json says of a variant: all that `solve` needs of it."""
    variant = parse_variant(kind, name, spec)
    return {**asdict(variant.footprint(spec)), "shape": variant.shape(spec), "hf": variant.to_hf(spec)}


def model_facts(parent: HfModel) -> dict:
    """Whole-model numbers that `solve` needs; tied embeddings count once."""
    embedding = parent.vocab_size * parent.spec.hidden_size
    spec = asdict(parent.spec)
    del spec["inv_freq"]
    return {
        "num_layers": parent.num_layers,
        "vocab_size": parent.vocab_size,
        "max_length": parent.max_length,
        "tied": parent.tied,
        "num_fixed_parameters": embedding * (1 if parent.tied else 2) + parent.spec.hidden_size,
        "head_shape": f"h{parent.spec.hidden_size} v{parent.vocab_size}",
        "spec": spec,
    }


def _all(trainers: dict[int, list[VariantTrainer]]) -> Iterator[VariantTrainer]:
    for of_layer in trainers.values():
        yield from of_layer


def _digest(values: list[str]) -> Tensor:
    return torch.frombuffer(bytearray(bytes.fromhex(content_hash(values))), dtype=torch.uint8)


def _stored_dtype(parent: HfModel) -> torch.dtype:
    return parent.final_norm().dtype


def build_library(source: str, options: BuildOptions) -> Path:
    """Build or complete the library at `options.out`. Raises UserError for every bad input before writing anything."""
    parent = open_model(source)
    builder = Builder(parent, options)
    check_writable(options.out)
    parent.check()
    builder.plan()
    data = builder.load_data()
    console.print(f"{len(data.train)} training and {len(data.validation)} validation sequences of {options.seq_len} "
                  f"from {data.num_documents} documents")  # fmt: skip
    builder.run(data)
    return options.out


def print_plan(builder: Builder, plan: BuildPlan, seconds: float | None) -> None:
    """The --dry-run report."""
    from puzzle.console import seconds_text

    console.print(f"device            {builder.device}")
    for kind in KINDS:
        console.print(f"{kind:<17} {', '.join(builder.variants[kind])}")
    console.print(f"layers            {len(builder.layers)} in {len(plan.groups)} group(s) of up to {len(plan.groups[0])}")
    console.print(f"trained           {plan.trained_parameters_per_layer:,} parameters per layer")
    console.print(f"device memory     {bytes_text(plan.peak_memory_bytes)} (predicted peak)")
    console.print(f"host activations  {bytes_text(plan.host_activation_bytes)}")
    console.print(f"disk              {bytes_text(plan.disk_bytes)} (library and one snapshot)")
    console.print(f"compute           {plan.flops:.2e} FLOPs over {plan.num_tokens:,} tokens")
    if seconds is not None:
        console.print(f"time              {seconds_text(seconds)} (predicted from two timed steps of one layer)")
