"""Several sequences in one row, told by positions that begin again at 0: as if each were alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache

spec = importlib.util.spec_from_file_location("modeling_cases", Path(__file__).with_name("test_modeling.py"))
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)

LENGTHS = (5, 1, 1, 17, 9)
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 12, **FACTORS}


def packed(padding: int = 0):
    """Sequences [1, length], their row, its positions and mask with padding at the end."""
    alone = [cases.tokens(1, length, seed=length) for length in LENGTHS]
    row = torch.cat([*alone, torch.zeros(1, padding, dtype=torch.long)], dim=1)
    positions = torch.cat([*(torch.arange(length) for length in LENGTHS), torch.zeros(padding, dtype=torch.long)])
    mask = (torch.arange(row.shape[1]) < sum(LENGTHS)).long()
    return alone, row, positions[None], mask[None]


def check(model, logits, alone):
    with torch.no_grad():
        wanted = torch.cat([model(ids).logits for ids in alone], dim=1)
    torch.testing.assert_close(logits[:, : wanted.shape[1]], wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rope", ["default", "longrope"])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_packed_sequences_do_not_see_each_other(layout, rope):
    """With and without a mask of the padding; with longrope each has the frequencies of its own length."""
    changes = {"rope_parameters": LONGROPE} if rope == "longrope" else {}
    model = cases.child(cases.LAYOUTS[layout], **changes)
    for padding in (0, 6):
        alone, row, positions, mask = packed(padding)
        with torch.no_grad():
            out = model(row, position_ids=positions)
            check(model, out.logits, alone)
            check(model, model(row, position_ids=positions, attention_mask=mask).logits, alone)
            two = model(row.repeat(2, 1), position_ids=positions, attention_mask=mask.repeat(2, 1)).logits
            check(model, two[1:], alone)
        assert getattr(out, cases.CACHE_NAME) is None or not model.model.windows


def test_gradients_are_those_of_the_sequences_alone():
    model = cases.child(cases.LAYOUTS["everything"]).train()
    model.gradient_checkpointing_enable()
    alone, row, positions, _ = packed()
    model(row, position_ids=positions).logits.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    sum(model(ids).logits.square().sum() for ids in alone).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-3)


def test_a_collator_may_say_it_again():
    """transformers' own: boundaries and the numbers of sequences come with the positions."""
    model = cases.child(cases.LAYOUTS["everything"])
    alone, *_ = packed()
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collate([{"input_ids": ids[0].tolist()} for ids in alone])
    assert {"position_ids", "cu_seq_lens_q", "seq_idx"} <= set(batch)
    with torch.no_grad():
        check(model, model(**batch).logits, alone)


def test_what_packing_cannot_do_is_said():
    model = cases.child(cases.LAYOUTS["everything"])
    _, row, positions, _ = packed()
    for wrong in (positions + 1, torch.cat((positions[:, :-1], torch.tensor([[40]])), dim=1)):
        with pytest.raises(ValueError, match="packed sequences begin at 0"):
            model(row, position_ids=wrong)
    with pytest.raises(ValueError, match="take no cache"):
        model(row, position_ids=positions, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="take no cached tokens"):
        model(row, position_ids=positions, past_key_values=getattr(model(row[:, :4]), cases.CACHE_NAME))
    for wrong in (None, torch.arange(row.shape[1])[None]):
        with pytest.raises(ValueError, match="cu_seq_lens_q without position_ids"):
            model(row, position_ids=wrong, cu_seq_lens_q=torch.tensor([0, 5, row.shape[1]]))
    shifted = torch.arange(3, 3 + row.shape[1])[None]  # one sequence that begins elsewhere is no packing
    with torch.no_grad():
        assert torch.allclose(model(row, position_ids=shifted).logits, model(row).logits, atol=1e-4)
