"""Names of what may stand in for a parent's sub-block, and the search space that they make. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from puzzle.base.errors import UserError, nearest
from puzzle.blocklib.sub_block import SubBlock, Variant, kinds

PARENT = "parent"  # the name under which the parent's own sub-block is always a choice


def _own(parent: SubBlock) -> Variant:
    return Variant(
        name=PARENT, sub_block=parent, initialise=lambda block: {n: t.float() for n, t in block.weights.items()}
    )


def variant_of(parent: SubBlock, name: str, slot: str = "sub-block") -> Variant:
    """The variant that `name` ("kv2", "window-128", "0.5", "linear", "none", "parent") means in place of `parent`.

    slot: how messages call it. Raises UserError for an unknown name (with the nearest known one) or an impossible value.
    """
    if name == PARENT:
        return _own(parent)
    for kind in (
        kinds().values() if name.isascii() else ()
    ):  # digits of other scripts would make a second name of the same
        if (variant := kind.stand_in(parent, name)) is not None:
            return variant
    raise UserError(f"unknown {slot} variant '{name}': {nearest(name, [PARENT, *default_names(parent)])}")


def made_of(own: SubBlock, origin: SubBlock, name: str, slot: str = "sub-block") -> Variant | None:
    """What `name` means in place of `origin`, made of `own`, to which `origin` has been cut before; None where it cannot be."""
    wanted = variant_of(origin, name, slot)
    if wanted.sub_block.begins(own):  # a narrower FFN starts from whatever is wider
        return wanted
    try:
        made = variant_of(own, name, slot)
    except UserError:
        return None
    return made if made.sub_block == wanted.sub_block else None


def default_names(parent: SubBlock) -> list[str]:
    """What every kind offers for `parent`."""
    return [name for kind in kinds().values() for name in kind.stand_ins(parent)]


def search_space(parent: SubBlock, names: str | None, slot: str = "sub-block") -> dict[str, SubBlock]:
    """{name: sub-block} of what may stand in one place, the parent first. Names that mean the parent are merged with it.

    names: comma-separated; None takes the default. Raises UserError as `variant_of` does.
    """
    asked = default_names(parent) if names is None else [n.strip() for n in names.split(",") if n.strip()]
    space = {PARENT: parent}
    for name in asked:
        variant = variant_of(parent, name, slot)
        if variant.sub_block != parent:
            space.setdefault(variant.name, variant.sub_block)
    return space


def search_spaces(
    layers: Mapping[int, Mapping[str, SubBlock]],
    names: Mapping[str, str | None],
    origins: Mapping[int, Mapping[str, SubBlock]] | None = None,
) -> dict[int, dict[str, dict[str, SubBlock]]]:
    """The `search_space` of every slot of several layers, slots in the order of each layer. names: per slot, comma-separated; None
    takes what each place offers. origins: what the layers were before they were cut, in place of which names mean what they mean; None: these.

    A name that some layers cannot take (a window where the parent's is smaller) is left out there. Raises UserError for a name
    that none of them takes.
    """
    spaces: dict[int, dict[str, dict[str, SubBlock]]] = {index: {} for index in layers}
    origins = origins or layers
    for slot in dict.fromkeys(slot for layer in layers.values() for slot in layer):
        having = {index: origins[index][slot] for index, layer in layers.items() if slot in layer}
        asked = names.get(slot)
        taken = None if asked is None else _taken(list(having.values()), asked, slot)
        for index, parent in having.items():
            own = None if taken is None else ",".join(taken[parent])
            now, space = layers[index][slot], search_space(parent, own, slot)
            made = {name: made_of(now, parent, name, slot) for name in space}
            kept = {name: one.sub_block for name, one in made.items() if one is not None and one.sub_block != now}
            spaces[index][slot] = {PARENT: now} | kept
    return {index: {slot: spaces[index][slot] for slot in layer} for index, layer in layers.items()}


def bundles(space: Mapping[str, SubBlock], nested: bool) -> list[tuple[str, ...]]:
    """Names of a place's variants, the parent left out, as they are trained: alone or, `nested`, those that begin the same widest one
    together, the narrowest first (Matryoshka, arXiv 2310.07707). Raises UserError for nested ones of one size."""
    names = [name for name in space if name != PARENT]
    if not nested:
        return [(name,) for name in names]
    for name in names:
        if twin := next((n for n in names if n != name and space[n] == space[name]), None):
            raise UserError(f"`nested` does not take {name} and {twin}, which are of one size: leave one out")
    widest = [n for n in names if not any(space[n].begins(space[m]) for m in names)]
    found = [[*(n for n in names if space[n].begins(space[last])), last] for last in widest]
    return [tuple(sorted(one, key=lambda n: space[n].num_parameters)) for one in found]


def _taken(parents: list[SubBlock], names: str, slot: str) -> dict[SubBlock, list[str]]:
    """Which of the names each parent takes."""
    found: dict[SubBlock, list[str]] = {parent: [] for parent in parents}
    for name in (n.strip() for n in names.split(",") if n.strip()):
        first: UserError | None = None
        for parent in found:
            try:
                variant_of(parent, name, slot)
            except UserError as error:
                first = first or error
            else:
                found[parent].append(name)
        if first is not None and not any(name in taken for taken in found.values()):
            raise UserError(f"`{slot}` {names}: {first}") from first
    return found
